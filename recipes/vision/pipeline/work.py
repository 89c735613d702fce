"""What is made of a few pictures at a time, in a worker process or in this one: they are read, cropped and resized."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..pictures.base import EncodedItem, Item
from ..pictures.decoding import decode
from ..views.crops import Size, box_of, box_within, boxes, central_square, central_view, cropped
from ..views.evaluation_view import EvalView
from ..views.view_policy import ViewParameters, ViewPolicy

Numbers = np.ndarray[Any, np.dtype[np.float64]]

DIGEST = 16
"""Bytes kept of a file's SHA-256."""


class Crops(Protocol):
    """What is cut from each of n pictures."""

    @property
    def side(self) -> int:
        """Of what comes out (px)."""
        ...

    def of(self, index: int, picture: Tensor, interpolation: str | None = None, original: Size | None = None) -> Tensor:
        """That of picture `index`, uint8 [1, C, H, W]: uint8 [1, C, side, side].

        Another interpolation is for masks; `original` is the size that a reduced picture had.
        """
        ...

    def of_all(self, pictures: Tensor) -> Tensor:
        """Those of all n pictures, uint8 [n, C, H, W], number for number what `of` gives one by one."""
        ...


@dataclass(frozen=True)
class RandomCrops:
    """Drawn crops, in the units of `ViewParameters`, which the size of each picture turns into pixels."""

    side: int
    interpolation: str
    ratio: tuple[float, float]
    areas: Numbers
    aspects: Numbers
    places: Numbers

    @classmethod
    def drawn(cls, policy: ViewPolicy, parameters: ViewParameters) -> RandomCrops:
        """Those of views that are drawn."""
        numbers = (part.numpy() for part in (parameters.area, parameters.aspect, parameters.place))
        return cls(policy.size, policy.interpolation, policy.crop_ratio, *numbers)

    def of(self, index: int, picture: Tensor, interpolation: str | None = None, original: Size | None = None) -> Tensor:
        area, aspect, place = (part[index].tolist() for part in (self.areas, self.aspects, self.places))
        size = original or (picture.shape[2], picture.shape[3])
        box = box_within(box_of(area, aspect, place, self.ratio, *size), size, picture)
        return cropped(picture, box, self.side, interpolation or self.interpolation)

    def of_all(self, pictures: Tensor) -> Tensor:
        area, aspect, place = (torch.from_numpy(part) for part in (self.areas, self.aspects, self.places))
        found = boxes(area, aspect, place, self.ratio, pictures.shape[2], pictures.shape[3])
        rows = torch.stack((found.top, found.left, found.height, found.width), dim=1)
        if (rows == rows[:1]).all():
            top, left, height, width = rows[0].tolist()
            return cropped(pictures, (top, left, height, width), self.side, self.interpolation)
        each = zip(pictures.split(1), rows.tolist(), strict=True)
        return torch.cat([cropped(picture, tuple(box), self.side, self.interpolation) for picture, box in each])


@dataclass(frozen=True)
class EvaluationCrops:
    """The central crops of an evaluation."""

    view: EvalView

    @property
    def side(self) -> int:
        return self.view.crop

    def of(self, index: int, picture: Tensor, interpolation: str | None = None, original: Size | None = None) -> Tensor:
        view = self.view
        return central_view(picture, view.resize, view.crop, interpolation or view.interpolation, original)

    def of_all(self, pictures: Tensor) -> Tensor:
        return self.of(0, pictures)


@dataclass(frozen=True)
class Squares:
    """The largest central squares, for tasks that declare no view: pictures at a working size."""

    side: int

    def of(self, index: int, picture: Tensor, interpolation: str | None = None, original: Size | None = None) -> Tensor:
        return central_square(picture, self.side, interpolation or "bicubic", original)

    def of_all(self, pictures: Tensor) -> Tensor:
        return self.of(0, pictures)


@dataclass(frozen=True)
class Made:
    """Crops of n pictures.

    Attributes:
        crops: of each kind asked for, uint8 [n, 1 or 3, side, side].
        masks: the same of their masks, uint8 [n, side, side]; none where there are no masks.
        digests: of the files of those pictures for which they were asked for, `DIGEST` bytes each.
    """

    crops: tuple[Tensor, ...]
    masks: tuple[Tensor, ...] = ()
    digests: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Work:
    """A slice of a batch: which pictures, and what to make of each.

    Attributes:
        pictures: where they are read from, or, of one size in memory, themselves, uint8 [n, C, H, W].
        crops: one or more kinds.
        masks: a class for each pixel, uint8 [n, H, W], where labels are masks: cut as the pictures are.
        digests: places of pictures whose files are hashed while they are at hand.
    """

    pictures: Sequence[Item] | Tensor
    crops: Sequence[Crops]
    masks: Tensor | None = None
    digests: frozenset[int] = frozenset()

    def run(self) -> Made:
        """Make it. Raises DataError, naming the file, where a picture cannot be read."""
        masks = () if self.masks is None else tuple(self._masks(self.masks, crops) for crops in self.crops)
        if isinstance(self.pictures, Tensor):
            return Made(tuple(crops.of_all(self.pictures) for crops in self.crops), masks)
        rows: list[list[Tensor]] = [[] for _ in self.crops]
        digests = list[bytes]()
        for index, item in enumerate(self.pictures):
            if index in self.digests and isinstance(item, EncodedItem):
                content = item.content()
                digests.append(digest(content))
                picture = decode(content, item.name)
            else:
                picture = item.picture()
            for row, crops in zip(rows, self.crops, strict=True):
                row.append(crops.of(index, picture.unsqueeze(0), original=item.original))
        return Made(tuple(map(joined, rows)), masks, tuple(digests))

    def _masks(self, masks: Tensor, crops: Crops) -> Tensor:
        cut = [crops.of(index, mask[None, None], "nearest-exact") for index, mask in enumerate(masks)]
        return torch.cat(cut).squeeze(1)

    @property
    def nbytes(self) -> int:
        """Bytes that the crops will take at most."""
        return sum(3 * crops.side**2 for crops in self.crops) * len(self.pictures)


def digest(content: bytes) -> bytes:
    """What stands for the content of a file."""
    return hashlib.sha256(content).digest()[:DIGEST]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Pictures of one size [n, 1 or 3, H, W] behind one another; grey ones get three channels beside coloured ones."""
    channels = max(part.shape[1] for part in parts)
    return torch.cat([part.expand(-1, channels, -1, -1) for part in parts])
