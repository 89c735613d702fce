"""Boxes of random crops in pixels, and crops of one uint8 picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .view_policy import ViewParameters

Box = tuple[int, int, int, int]
"""Top, left, height and width of a crop (px)."""

LONGEST = 8
"""A picture that is longer than this many times its shorter side is cut to that before an evaluation's resize, where
the longer side would grow without bound; its central crop stays."""


@dataclass(frozen=True, eq=False)
class Boxes:
    """The crops of a batch of pictures of one size: int64 [N] each (px)."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def central_box(ratio: Sequence[float], height: int, width: int) -> Box:
    """The largest central crop whose width / height lies within `ratio`."""
    if width / height < ratio[0]:
        crop_height, crop_width = round(width / ratio[0]), width
    elif width / height > ratio[1]:
        crop_height, crop_width = height, round(height * ratio[1])
    else:
        crop_height, crop_width = height, width
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def boxes(parameters: ViewParameters, ratio: Sequence[float], height: int, width: int) -> Boxes:
    """The crops of pictures that are all of `height` x `width` px: the first attempt that fits, else the central one.

    Args:
        ratio: range of width / height, for `central_box`.
    """
    area = height * width * parameters.area
    widths, heights = (area * parameters.aspect).sqrt().round().long(), (area / parameters.aspect).sqrt().round().long()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    # argmax of a 0/1 tensor is the first attempt that fits; where none does, the value is replaced below.
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    crop_width, crop_height = widths.gather(1, first).squeeze(1), heights.gather(1, first).squeeze(1)
    top = (parameters.place[:, 0] * (height - crop_height + 1)).long()
    left = (parameters.place[:, 1] * (width - crop_width + 1)).long()
    drawn = zip((top, left, crop_height, crop_width), central_box(ratio, height, width), strict=True)
    return Boxes(*(torch.where(fits.any(dim=1), values, central) for values, central in drawn))


def box_of(
    areas: Sequence[float],
    aspects: Sequence[float],
    place: Sequence[float],
    ratio: Sequence[float],
    height: int,
    width: int,
) -> Box:
    """The same for one picture of any size: `boxes` of a single row, number for number."""
    for share, aspect in zip(areas, aspects, strict=True):
        area = height * width * share
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = int(place[0] * (height - crop_height + 1)), int(place[1] * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    return central_box(ratio, height, width)


def resized(picture: Tensor, height: int, width: int, interpolation: str) -> Tensor:
    """A uint8 picture [C, H, W] at another size, antialiased; by torch's uint8 kernel, whose bits do not hang on the
    processor. "nearest-exact" is for masks."""
    if picture.shape[1:] == (height, width):
        return picture
    batch = picture.unsqueeze(0)
    if interpolation == "nearest-exact":
        return interpolate(batch, (height, width), mode=interpolation).squeeze(0)
    if len(picture) == 3:
        batch = batch.contiguous(memory_format=torch.channels_last)
    return interpolate(batch, (height, width), mode=interpolation, antialias=True).squeeze(0)


def cropped(picture: Tensor, box: Box, size: int, interpolation: str) -> Tensor:
    """The box of a uint8 picture [C, H, W] as a square of `size` px."""
    top, left, height, width = box
    return resized(picture[:, top : top + height, left : left + width], size, size, interpolation)


def central_view(picture: Tensor, resize: int, crop: int, interpolation: str) -> Tensor:
    """A uint8 picture [C, H, W] with its shorter side at `resize` px, of which the central square of `crop` px.

    As torchvision's Resize and CenterCrop: the longer side is rounded down, the offset to the nearest pixel.
    """
    height, width = picture.shape[1:]
    short = min(height, width)
    if max(height, width) > LONGEST * short:
        top, left, height, width = central_box((1 / LONGEST, LONGEST), height, width)
        picture = picture[:, top : top + height, left : left + width]
    sides = (resize, int(resize * width / height)) if height <= width else (int(resize * height / width), resize)
    whole = resized(picture, *sides, interpolation)
    top, left = (round((side - crop) / 2.0) for side in sides)
    return whole[:, top : top + crop, left : left + crop]


def central_square(picture: Tensor, side: int, interpolation: str) -> Tensor:
    """The largest central square of a uint8 picture [C, H, W] at `side` px."""
    height, width = picture.shape[1:]
    short = min(height, width)
    box = round((height - short) / 2), round((width - short) / 2), short, short
    return cropped(picture, box, side, interpolation)
