"""Boxes of random crops in pixels, and crops of uint8 pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

Box = tuple[int, int, int, int]
"""Top, left, height and width of a crop (px)."""

Size = tuple[int, int]
"""Height and width of a picture (px)."""

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


def boxes(area: Tensor, aspect: Tensor, place: Tensor, ratio: Sequence[float], height: int, width: int) -> Boxes:
    """The crops of N pictures that are all of `height` x `width` px: the first attempt that fits, else the central one.

    Args:
        area, aspect, place: as drawn, see `ViewParameters`.
        ratio: range of width / height, for `central_box`.
    """
    pixels = height * width * area
    widths, heights = (pixels * aspect).sqrt().round().long(), (pixels / aspect).sqrt().round().long()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    # argmax of a 0/1 tensor is the first attempt that fits; where none does, the value is replaced below.
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    crop_width, crop_height = widths.gather(1, first).squeeze(1), heights.gather(1, first).squeeze(1)
    top = (place[:, 0] * (height - crop_height + 1)).long()
    left = (place[:, 1] * (width - crop_width + 1)).long()
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


def resized(pictures: Tensor, height: int, width: int, interpolation: str) -> Tensor:
    """uint8 pictures [N, C, H, W] at another size, antialiased; by torch's uint8 kernel, whose bits do not hang on the
    processor. "nearest-exact" is for masks."""
    if pictures.shape[2:] == (height, width):
        return pictures
    if interpolation == "nearest-exact":
        return interpolate(pictures, (height, width), mode=interpolation)
    if pictures.shape[1] == 3:
        pictures = pictures.contiguous(memory_format=torch.channels_last)
    return interpolate(pictures, (height, width), mode=interpolation, antialias=True)


def cropped(pictures: Tensor, box: Box, size: int, interpolation: str) -> Tensor:
    """The same box of uint8 pictures [N, C, H, W] as squares of `size` px."""
    top, left, height, width = box
    return resized(pictures[:, :, top : top + height, left : left + width], size, size, interpolation)


def box_within(box: Box, size: Size, pictures: Tensor) -> Box:
    """A box of pictures of `size` in the same ones reduced, [N, C, h, w], to the nearest pixel."""
    if size == tuple(pictures.shape[2:]):
        return box
    top, left, height, width = box
    down, across = pictures.shape[2] / size[0], pictures.shape[3] / size[1]
    first, start = round(top * down), round(left * across)
    return first, start, round((top + height) * down) - first, round((left + width) * across) - start


def central_view(pictures: Tensor, resize: int, crop: int, interpolation: str, original: Size | None = None) -> Tensor:
    """uint8 pictures [N, C, H, W] with their shorter side at `resize` px, of which the central squares of `crop` px.

    As torchvision's Resize and CenterCrop: the longer side is rounded down, the offset to the nearest pixel. `original`
    is the size that reduced pictures had.
    """
    height, width = original or pictures.shape[2:]
    if max(height, width) > LONGEST * min(height, width):
        box = central_box((1 / LONGEST, LONGEST), height, width)
        top, left, rows, columns = box_within(box, (height, width), pictures)
        pictures, (height, width) = pictures[:, :, top : top + rows, left : left + columns], box[2:]
    sides = (resize, int(resize * width / height)) if height <= width else (int(resize * height / width), resize)
    whole = resized(pictures, *sides, interpolation)
    top, left = (round((side - crop) / 2.0) for side in sides)
    return whole[:, :, top : top + crop, left : left + crop]


def central_square(pictures: Tensor, side: int, interpolation: str, original: Size | None = None) -> Tensor:
    """The largest central squares of uint8 pictures [N, C, H, W] at `side` px."""
    height, width = original or pictures.shape[2:]
    short = min(height, width)
    box = round((height - short) / 2), round((width - short) / 2), short, short
    return cropped(pictures, box_within(box, (height, width), pictures), side, interpolation)
