"""Turns by EXIF data, transparency in every mode that Pillow has, and warnings of its own that nobody sees."""

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from recipes.vision.pictures.rgb import to_rgb
from tests.support.paths import ROOT

Pixels = np.ndarray
UPRIGHT: Pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8)

# How the upright picture is stored so that EXIF's number puts it right.
STORED: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[:, ::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[::-1].swapaxes(0, 1),
}


def turned(number: int, kind: str = "PNG", pixels: Pixels = UPRIGHT) -> bytes:
    """A file whose EXIF data have the number."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = number
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, kind, exif=exif, lossless=True)
    return file.getvalue()


def read(content: bytes) -> Pixels:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(to_rgb(image))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("number", STORED)
def test_each_turn_of_exif_is_applied(number: int, kind: str) -> None:
    assert np.array_equal(read(turned(number, kind, STORED[number](UPRIGHT))), UPRIGHT)


@pytest.mark.parametrize("number", STORED)
def test_a_photograph_is_turned_too(number: int) -> None:
    smooth = np.add.outer(np.arange(24) * 4, np.arange(40) * 3)[..., None].repeat(3, 2).astype(np.uint8)
    found = read(turned(number, "JPEG", STORED[number](smooth)))
    assert found.shape == smooth.shape
    assert np.abs(found.astype(int) - smooth).max() <= 4


@pytest.mark.parametrize("number", [0, 9, 255, 65535])
def test_a_number_that_means_nothing_turns_nothing(number: int) -> None:
    assert np.array_equal(read(turned(number)), UPRIGHT)


def test_damaged_exif_data_turn_nothing() -> None:
    whole, exif = turned(6), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    assert read(whole).shape[:2] == UPRIGHT.shape[1::-1]
    for damage in (b"", b"garbage", b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff", exif.tobytes()[6:-9]):
        file = io.BytesIO()
        Image.fromarray(UPRIGHT).save(file, "PNG", exif=damage)
        assert np.array_equal(read(file.getvalue()), UPRIGHT), damage


ALPHA = np.linspace(0, 255, 40).astype(np.uint8).reshape(5, 8)


def on_white(colour: Pixels, alpha: Pixels) -> Pixels:
    weight = alpha[..., None] / 255
    return colour * weight + 255 * (1 - weight)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(file)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "none"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_laid_on_white(mode: str, kind: str) -> None:
    opaque = Image.fromarray(UPRIGHT).convert("L" if mode == "LA" else "RGB")
    image = opaque.convert(mode)
    image.putalpha(Image.fromarray(ALPHA))
    # Exact, or WebP would change the colour of what cannot be seen.
    given = image if kind == "none" else saved(image, kind, lossless=True, exact=True)
    expected = on_white(np.asarray(opaque.convert("RGB")), ALPHA)
    assert np.abs(np.asarray(to_rgb(given)) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_colours_that_were_multiplied_by_their_opacity_are_laid_on_white_too(mode: str) -> None:
    plain = "LA" if mode == "La" else "RGBA"
    image = Image.fromarray(UPRIGHT).convert(plain)
    image.putalpha(Image.fromarray(np.where(ALPHA > 127, 255, 0).astype(np.uint8)))
    assert np.array_equal(np.asarray(to_rgb(image.convert(mode))), np.asarray(to_rgb(image)))


@pytest.mark.parametrize("transparency", ["one colour", "bytes"])
@pytest.mark.parametrize("kind", ["PNG", "GIF", "none"])
def test_transparent_colours_of_a_palette_are_white(kind: str, transparency: str) -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    clear: object = 1 if transparency == "one colour" else bytes([255, 0, 255])
    if kind == "GIF" and transparency == "bytes":
        clear = 1
    if kind == "none":
        image.info["transparency"] = clear
    given = image if kind == "none" else saved(image, kind, transparency=clear)
    expected = [[[10, 20, 30], [255, 255, 255]], [[70, 80, 90], [255, 255, 255]]]
    assert np.asarray(to_rgb(given)).tolist() == expected


@pytest.mark.parametrize(("mode", "clear", "colour"), [("L", 7, 7), ("RGB", (7, 8, 9), (7, 8, 9)), ("1", 1, 255)])
def test_the_one_clear_colour_of_a_file_without_an_alpha_channel_is_white(
    mode: str, clear: object, colour: Any
) -> None:
    image = Image.new(mode, (2, 1), 0)
    image.putpixel((0, 0), colour)
    given = saved(image, transparency=clear)
    assert "transparency" in given.info
    assert np.asarray(to_rgb(given)).tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"])
def test_opaque_pictures_are_what_pillow_converts(mode: str) -> None:
    image = Image.fromarray(UPRIGHT).convert(mode)
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image.convert("RGB")))


# Each makes Pillow warn: of a palette, of EXIF data when a file is opened or asked for its turn, of a size.
WARNED = """
import io, sys, warnings
from pathlib import Path
from typing import Any
from threading import Thread
from PIL import Image
from recipes.vision.pictures.decoding import decode
from recipes.vision.errors import DataError

def file(image, kind, **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()

palette = Image.new("P", (4, 4))
palette.putpalette([1, 2, 3, 4, 5, 6])
grey = Image.new("L", (4, 4), 9)
cut = bytes.fromhex("49492a0008000000ffff")
large = bytearray(file(Image.new("1", (8, 8)), "BMP"))
large[18:26] = (10_000).to_bytes(4, "little") * 2
contents = {
    "palette": file(palette, "PNG", transparency=bytes([0, 255])),
    "exif.png": file(grey, "PNG", exif=cut),
    "exif.jpg": file(grey, "JPEG", exif=b"Exif\\0\\0" + cut),
    "exif.webp": file(grey, "WEBP", exif=cut),
    "large": bytes(large),
}
said = []

def decode_all():
    for name, content in contents.items():
        try:
            decode(content, name)
        except DataError as error:
            said.append(str(error))

workers = [Thread(target=decode_all) for _ in range(3)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
assert set(said) == {"large has 10000 x 10000 px, more than 50,000,000: scale it down"}, said
# Others' warnings are still theirs.
warnings.warn("not Pillow's")
"""


@pytest.mark.parametrize("filters", ["always", "default", "error"])
def test_pillows_own_warnings_do_not_stand_beside_our_messages(filters: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", f"{filters}::UserWarning", "-W", f"{filters}::RuntimeWarning", "-c", WARNED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stderr.splitlines() if "Warning" in line]
    assert len(lines) == 1, done.stderr
    assert "not Pillow's" in lines[0]
    assert done.returncode == (1 if filters == "error" else 0)
