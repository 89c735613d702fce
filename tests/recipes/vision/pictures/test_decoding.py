"""Files of every kind as pixels at their own size, and files that are none."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.vision.errors import DataError
from recipes.vision.pictures import decoding
from recipes.vision.pictures.decoding import decode
from tests.support.recipes.image_trees import picture


def encoded(image: Image.Image, kind: str) -> bytes:
    held = io.BytesIO()
    image.save(held, kind)
    return held.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "TIFF", "PPM", "JPEG"])
@pytest.mark.parametrize("size", [(20, 20), (31, 17), (1, 2000), (7, 1)])
def test_pixels_are_pillows_at_the_files_own_size(kind: str, size: tuple[int, int]) -> None:
    content = encoded(picture(1, *size), kind)
    with Image.open(io.BytesIO(content)) as image:
        expected = np.array(image.convert("RGB"))
    found = decode(content, "x")
    assert found.dtype == torch.uint8
    assert found.shape == (3, size[1], size[0])
    np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "PNG"), ("P", "PNG"), ("1", "PNG"), ("1", "TIFF"), ("L", "JPEG"), ("CMYK", "JPEG"), ("L", "PPM")],
)
def test_other_modes_become_rgb(mode: str, kind: str) -> None:
    content = encoded(picture(2).convert(mode), kind)
    with Image.open(io.BytesIO(content)) as image:
        expected = np.array(image.convert("RGB"))
    np.testing.assert_array_equal(decode(content, "x").permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_truncated_file_is_named(kind: str) -> None:
    content = encoded(picture(0), kind)
    with pytest.raises(DataError, match=r"^002\.img cannot be decoded \(.+\): it is damaged"):
        decode(content[: len(content) // 2], "002.img")


@pytest.mark.parametrize("content", [b"", b"this is text", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"\xff\xd8\xff\xe0" * 9])
def test_file_that_is_no_image_is_named(content: bytes) -> None:
    with pytest.raises(DataError, match=r"^000\.img cannot be decoded"):
        decode(content, "000.img")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_too_many_pixels_are_named(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_PIXELS", 1000)
    fits, bomb = (encoded(picture(0, width, 25), kind) for width in (40, 41))
    assert decode(fits, "fits").shape == (3, 25, 40)
    with pytest.raises(DataError, match="bomb has 41 x 25 px"):
        decode(bomb, "bomb")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="fits is too large"):
        decode(fits, "fits")


@pytest.mark.parametrize(
    ("dtype", "kind"), [(np.uint16, "PNG"), (np.uint16, "TIFF"), (np.float32, "TIFF"), (np.int32, "TIFF")]
)
def test_more_than_eight_bits_are_named(dtype: type[np.generic], kind: str) -> None:
    with pytest.raises(DataError, match="deep has more than 8 bits"):
        decode(encoded(Image.fromarray(np.full((9, 9), 40000, dtype=dtype)), kind), "deep")
