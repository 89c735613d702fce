"""Decoding an image file: every pixel of it, upright, opaque, three channels of eight bits."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable
from functools import cache
from importlib.metadata import version

import numpy as np
import PIL
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..errors import DataError
from .rgb import to_rgb, upright

RULES = 1
"""Version of what becomes of a file: the turn of EXIF, white behind transparency, three channels of eight bits."""

MAX_PIXELS = 50_000_000
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, RuntimeError, struct.error, zlib.error)
JPEG = ("JPEG", "MPO")
SOURCE_LINE = re.compile(r"^.*\.cpp:\d+, ")
"""Where in its own source torchvision says that an error was found."""


def decoders() -> dict[str, str]:
    """What decides a file's pixels besides its bytes: our rules and the versions of the packages that decode."""
    return {"rules": str(RULES), "torchvision": version("torchvision"), "pillow": PIL.__version__}


def decode(content: bytes, name: str) -> Tensor:
    """The picture in the bytes of an image file: uint8 [3, H, W], at its own size.

    JPEGs are decoded by torchvision, which a test holds to Pillow's pixels, other files and four-channel JPEGs by
    Pillow. The turn that EXIF asks for is applied; transparent pictures are composed on white.

    Raises:
        DataError: naming the file: damaged, cut short, no image, more than `MAX_PIXELS` pixels, or more than 8 bits a
            channel.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DataError(f"{name} has {width} x {height} px, more than {MAX_PIXELS:,}: scale it down")
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{name} has more than 8 bits a channel (mode {image.mode}): convert it to 8 bits")
            if image.format in JPEG and image.mode in ("L", "RGB") and (decode_jpeg := _jpeg_decoder()) is not None:
                # A copy: torch takes no memory that may not be written to.
                encoded = torch.from_numpy(np.frombuffer(bytearray(content), dtype=np.uint8))
                return upright(decode_jpeg(encoded, mode="RGB"), image)
            return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name} is too large to be decoded safely ({error}): scale it down") from error
    except DECODE_ERRORS as error:
        cause = _cause(error, content)
        raise DataError(f"{name} cannot be decoded ({cause}): it is damaged or not an image; replace it") from error


@cache
def _jpeg_decoder() -> Callable[..., Tensor] | None:
    """torchvision's, deprecated since 0.29: without it Pillow decodes JPEGs, to the same pixels, a little slower."""
    import torchvision  # nearly as long to import as torch: only once there is a JPEG

    return getattr(torchvision.io, "decode_jpeg", None)


def _cause(error: Exception, content: bytes) -> str:
    if not content:
        return "it is empty"
    if isinstance(error, UnidentifiedImageError):
        # Its own words are about an object in memory.
        return "its first bytes are of no kind of image"
    return SOURCE_LINE.sub("", str(error)) or type(error).__name__
