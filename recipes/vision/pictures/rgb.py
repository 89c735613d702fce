"""Any picture that Pillow opens as upright, opaque RGB."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from PIL import ExifTags, Image
from torch import Tensor

# Pillow warns of odd metadata, palettes and sizes. What is wrong with a picture is said in a DataError that names its
# file; `warnings.catch_warnings` around a decoder would not be safe beside other threads.
warnings.filterwarnings("ignore", module=r"PIL\.")

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What puts a picture upright, by the number that EXIF gives to the place of its first pixel."""

_TURNED: dict[Image.Transpose, Callable[[Tensor], Tensor]] = {
    Image.Transpose.FLIP_LEFT_RIGHT: lambda pixels: pixels.flip(2),
    Image.Transpose.ROTATE_180: lambda pixels: pixels.flip(1, 2),
    Image.Transpose.FLIP_TOP_BOTTOM: lambda pixels: pixels.flip(1),
    Image.Transpose.TRANSPOSE: lambda pixels: pixels.transpose(1, 2),
    Image.Transpose.ROTATE_270: lambda pixels: pixels.flip(1).transpose(1, 2),
    Image.Transpose.TRANSVERSE: lambda pixels: pixels.flip(1, 2).transpose(1, 2),
    Image.Transpose.ROTATE_90: lambda pixels: pixels.flip(2).transpose(1, 2),
}


def to_rgb(image: Image.Image) -> Image.Image:
    """The same picture turned as its EXIF data ask, on white where it is transparent, as RGB.

    EXIF data that cannot be read, or that give no such number, turn nothing.
    """
    # First: formats that turn a picture while they decode it then say no more of it.
    image.load()
    turn = _turn(image)
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "La":
        # Pillow converts it to nothing else.
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def upright(pixels: Tensor, image: Image.Image) -> Tensor:
    """The pixels [3, H, W] of an opened file, decoded elsewhere, turned as its EXIF data ask."""
    turn = _turn(image)
    return pixels if turn is None else _TURNED[turn](pixels)


def _turn(image: Image.Image) -> Image.Transpose | None:
    # Not ImageOps.exif_transpose, which writes the data anew and fails where they are damaged.
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        # Whatever bytes that are no EXIF data make the reader stumble over.
        return None
