"""Decoding: Pillow's pixels from every kind of file, and one sentence about every file that has none."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.vision.errors import DataError
from recipes.vision.pictures import decoding
from recipes.vision.pictures.decoding import decode
from tests.support.recipes.sample_photographs import by_pillow, encoded, photograph, pixels

JPEGS: dict[str, dict[str, Any]] = {
    "4:2:0": {},
    "4:4:4": dict(subsampling=0),
    "4:2:2": dict(subsampling=1),
    "progressive": dict(progressive=True),
    "optimized": dict(optimize=True, quality=60),
    "low": dict(quality=5),
    "restarts": dict(restart_marker_rows=1),
    "on its side": dict(turn=6),
    "other side": dict(turn=8),
    "upside down": dict(turn=3),
    "comment": dict(comment=b"\xff\x00 no text"),
    "profile": dict(icc_profile=bytes(70_000)),
}


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(500, 375), (375, 500), (33, 17), (8, 8), (1, 1), (1, 40), (41, 1)])
@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_a_jpeg_has_pillows_pixels(options: dict[str, Any], size: tuple[int, int], mode: str) -> None:
    content = encoded(photograph(3, *size, mode), **options)
    assert torch.equal(decode(content, "a.jpg"), pixels(by_pillow(content)))


@pytest.mark.parametrize("turn", [None, 6])
def test_without_torchvisions_decoder_pixels_are_the_same(turn: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(photograph(3, 500, 375, "RGB"), turn=turn)
    expected = decode(content, "a.jpg")
    monkeypatch.setattr(decoding, "_jpeg_decoder", lambda: None)
    assert torch.equal(decode(content, "a.jpg"), expected)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "TIFF", "PPM", "GIF", "P"])
@pytest.mark.parametrize("mode", ["RGB", "L", "1"])
@pytest.mark.parametrize("size", [(50, 37), (1, 1), (1, 40), (41, 1)])
def test_other_files_have_pillows_pixels(kind: str, mode: str, size: tuple[int, int]) -> None:
    content = (
        encoded(photograph(5, *size, mode).convert(kind), "PNG")
        if kind == "P"
        else encoded(photograph(5, *size, mode), kind)
    )
    decoded = decode(content, "a")
    assert decoded.dtype == torch.uint8
    assert torch.equal(decoded, pixels(by_pillow(content)))


@pytest.mark.parametrize("turn", [3, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_turned_picture_is_put_upright(kind: str, turn: int) -> None:
    upright = photograph(2, 60, 40)
    decoded = decode(encoded(upright, kind, turn), "a")
    assert decoded.shape == (3, 40, 60)
    # A JPEG of a turned picture has other blocks.
    assert (decoded.float() - pixels(upright).float()).abs().mean() < (8 if kind in ("JPEG", "WEBP") else 1e-6)


def mirrored(number: int) -> tuple[bytes, Image.Image]:
    """A file that asks for one of the eight turns, and what it shows."""
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }[number]
    stored = photograph(4, 64, 32)
    exif = Image.Exif()
    exif[0x0112] = number
    content = encoded(stored, exif=exif)
    seen = by_pillow_unturned(content)
    return content, seen if undo is None else seen.transpose(undo)


def by_pillow_unturned(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB")


@pytest.mark.parametrize("number", range(1, 9))
def test_every_turn_of_a_jpeg(number: int) -> None:
    content, seen = mirrored(number)
    assert torch.equal(decode(content, "a.jpg"), pixels(seen))


@pytest.mark.parametrize("first", [b"http://ns.adobe.com/xap/1.0/\x00<x/>", b"Other\x00\x00" + bytes(300)])
def test_a_turn_after_other_metadata(first: bytes) -> None:
    """Adobe's programs write a segment of their own of the same kind, before or after EXIF's."""
    content, seen = mirrored(6)
    segment = b"\xff\xe1" + (len(first) + 2).to_bytes(2, "big") + first
    assert torch.equal(decode(content[:2] + segment + content[2:], "a.jpg"), pixels(seen))


@pytest.mark.parametrize("damage", ["zeros", "ones", "short", "huge offset", "no turn of that number", "text"])
def test_damaged_exif_data_turn_nothing(damage: str) -> None:
    content, _ = mirrored(6)
    start = content.index(b"Exif\0\0") + 6
    length = int.from_bytes(content[start - 8 : start - 6], "big") - 8
    exif = content[start : start + length]
    place = exif.index((0x0112).to_bytes(2, "big" if exif[:2] == b"MM" else "little"))
    worse = {
        "zeros": bytes(length),
        "ones": b"\xff" * length,
        "short": exif[:6] + bytes(length - 6),
        "huge offset": exif[:4] + b"\xff\xff\xff\x7f" + exif[8:],
        "no turn of that number": exif[: place + 8] + b"\x63\x63" + exif[place + 10 :],
        "text": (b"not exif at all " * length)[:length],
    }[damage]
    changed = content[:start] + worse + content[start + length :]
    assert torch.equal(decode(changed, "a.jpg"), pixels(by_pillow_unturned(content)))


@pytest.mark.parametrize("adobe", [True, False])
def test_a_jpeg_of_four_inks_has_the_right_colours(adobe: bool) -> None:
    """Pillow writes inks the wrong way round, as Adobe does, and says so in a segment that others leave out."""
    colours = Image.new("RGB", (48, 16), "red")
    colours.paste("lime", (16, 0, 32, 16))
    colours.paste("white", (32, 0, 48, 16))
    content = encoded(colours.convert("CMYK"), quality=100, subsampling=0)
    if not adobe:
        start = content.index(b"\xff\xee")
        content = content[:start] + content[start + 2 + int.from_bytes(content[start + 2 : start + 4], "big") :]
    decoded = decode(content, "a.jpg")
    assert torch.equal(decoded, pixels(by_pillow(content)))
    if adobe:
        for place, colour in ((8, (255, 0, 0)), (24, (0, 255, 0)), (40, (255, 255, 255))):
            assert (decoded[:, 8, place].int() - torch.tensor(colour)).abs().max() <= 3


@pytest.mark.parametrize("kind", ["MPO", "GIF", "TIFF", "WEBP", "PNG"])
def test_the_first_picture_of_several(kind: str) -> None:
    first, second = photograph(1, 40, 30), photograph(2, 40, 30)
    held = io.BytesIO()
    first.save(held, kind, save_all=True, append_images=[second])
    content = held.getvalue()
    assert torch.equal(decode(content, "a"), pixels(by_pillow(content)))
    assert (decode(content, "a").float() - pixels(first).float()).abs().mean() < 8


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparent_pictures_lie_on_white(kind: str) -> None:
    image = Image.new("RGBA", (6, 4), (200, 0, 0, 255))
    image.putpixel((0, 0), (200, 0, 0, 0))
    held = io.BytesIO()
    image.save(held, kind, lossless=True)
    decoded = decode(held.getvalue(), "a")
    assert decoded[:, 0, 0].tolist() == [255, 255, 255]
    assert decoded[:, 1, 1].tolist() == [200, 0, 0]


def test_pixels_may_be_written_to() -> None:
    for kind in ("JPEG", "PNG"):
        content = encoded(photograph(0, 9, 7), kind)
        decode(content, "a").zero_()
        assert decode(content, "a").any()


def sixteen_bits(kind: str) -> bytes:
    return encoded(Image.fromarray(np.full((9, 9), 40000, dtype=np.uint16)), kind)


NO_PICTURES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", r"cannot be decoded \(it is empty\)"),
    "text": (b"this is text", r"cannot be decoded \(its first bytes are of no kind of image\)"),
    "markup": (b"<html><body>404</body></html>" * 9, r"cannot be decoded \(its first bytes are of no kind of image\)"),
    "zeros": (bytes(4000), r"cannot be decoded \(its first bytes are of no kind of image\)"),
    "half a JPEG": (encoded(photograph(0, 60, 40))[:900], r"cannot be decoded \(Image is incomplete or truncated\)"),
    "signature of a PNG": (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "cannot be decoded"),
    "signature of a JPEG": (b"\xff\xd8\xff\xe0" + b"\0" * 40, "cannot be decoded"),
    "16-bit PNG": (sixteen_bits("PNG"), r"has more than 8 bits a channel \(mode I;16\): convert"),
    "16-bit TIFF": (sixteen_bits("TIFF"), "has more than 8 bits a channel"),
    "32-bit TIFF": (encoded(Image.new("I", (4, 4), 70000), "TIFF"), r"more than 8 bits a channel \(mode I\)"),
    "float TIFF": (encoded(Image.new("F", (4, 4), 0.5), "TIFF"), r"more than 8 bits a channel \(mode F\)"),
}


@pytest.mark.parametrize("case", NO_PICTURES)
def test_what_is_no_picture_is_named(case: str) -> None:
    content, said = NO_PICTURES[case]
    with pytest.raises(DataError, match=rf"^deep/a b\.jpg .*{said}"):
        decode(content, "deep/a b.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "progressive", "grey", "CMYK"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9, 0.99])
def test_a_file_that_is_cut_short_is_named(kind: str, share: float) -> None:
    image = photograph(1, 120, 90, {"grey": "L", "CMYK": "CMYK"}.get(kind, "RGB"))
    jpeg = kind in ("JPEG", "progressive", "grey", "CMYK")
    content = encoded(image, "JPEG" if jpeg else kind, progressive=kind == "progressive")
    with pytest.raises(DataError, match=r"^cut\.png cannot be decoded \(.*\): it is damaged or not an image; replace"):
        decode(content[: int(share * len(content))], "cut.png")


def test_a_picture_of_too_many_pixels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_PIXELS", 1000)
    for kind in ("JPEG", "PNG"):
        fits, bomb = encoded(photograph(0, 40, 25), kind), encoded(photograph(0, 41, 25), kind)
        assert decode(fits, "fits").shape == (3, 25, 40)
        with pytest.raises(DataError, match=r"^bomb has 41 x 25 px, more than 1,000"):
            decode(bomb, "bomb")
        with monkeypatch.context() as patch:
            patch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
            with pytest.raises(DataError, match=r"^fits is too large"):
                decode(fits, "fits")


def changed(content: bytes, chance: random.Random) -> bytes:
    """The file with some of its bytes replaced, taken out, doubled, or with another end."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 5, 30))):
        # Headers decide more than pixels do.
        place = chance.randrange(len(data) if chance.random() < 0.5 else min(len(data), 200))
        kind = chance.randrange(5)
        if kind == 0:
            data[place] = chance.randrange(256)
        elif kind == 1:
            data[place : place + 4] = chance.choice(
                (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\1")
            )
        elif kind == 2:
            del data[place : place + chance.choice((1, 2, 50))]
        elif kind == 3:
            data[place:place] = data[place : place + chance.choice((1, 2, 50))]
        else:
            data[place] ^= 1 << chance.randrange(8)
        if len(data) < 10:
            break
    return bytes(data)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(
    "kind",
    ["JPEG", "progressive", "grey", "CMYK", "PNG", "P", "RGBA", "GIF", "BMP", "WEBP", "TIFF", "LZW", "PPM", "MPO"],
)
def test_damaged_bytes_raise_nothing_but_a_sentence(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A header of a damaged file may claim any size: memory for it is not what is tested here.
    monkeypatch.setattr(decoding, "MAX_PIXELS", 200_000)
    mode = {"grey": "L", "CMYK": "CMYK", "P": "P", "GIF": "P", "RGBA": "RGBA"}.get(kind, "RGB")
    format = {"progressive": "JPEG", "grey": "JPEG", "CMYK": "JPEG", "P": "PNG", "RGBA": "PNG", "LZW": "TIFF"}.get(
        kind, kind
    )
    options: dict[str, Any] = {"LZW": dict(compression="tiff_lzw"), "progressive": dict(progressive=True)}.get(kind, {})
    content = encoded(
        photograph(6, 40, 30, mode), format, **({} if format in ("GIF", "BMP", "PPM") else {"turn": 6}), **options
    )
    chance = random.Random(kind)
    refused = 0
    for _ in range(300):
        damaged = changed(content, chance)
        said = None
        try:
            decoded = decode(damaged, "a.jpg")
        except DataError as error:
            said = str(error)
        if said is not None:
            refused += 1
            assert said.startswith("a.jpg ")
            assert "\n" not in said
        else:
            assert decoded.dtype == torch.uint8
            assert decoded.ndim == 3
            assert decoded.shape[0] == 3
    assert refused > 20
