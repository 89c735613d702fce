"""Pictures in memory: of one size in one tensor, or of any sizes one behind the other."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .base import Images, Item

CHUNK = 64
SMALL_FILE = 8192


@dataclass(frozen=True, eq=False)
class MemoryItem(Item):
    """A picture in memory."""

    pixels: Tensor

    def picture(self) -> Tensor:
        return self.pixels


@dataclass(frozen=True, eq=False)
class ArrayImages(Images):
    """`pixels`: uint8 [N, 1 or 3, H, W]."""

    pixels: Tensor
    in_memory = True

    def __len__(self) -> int:
        return len(self.pixels)

    def items(self, positions: Sequence[int]) -> list[MemoryItem]:
        return [MemoryItem(self.pixels[position]) for position in positions]

    def subset(self, positions: Tensor) -> ArrayImages:
        return ArrayImages(self.pixels[positions.to(self.pixels.device)])

    @property
    def array(self) -> Tensor:
        return self.pixels

    @property
    def nbytes(self) -> int:
        return self.pixels.nbytes


@dataclass(frozen=True, eq=False)
class PackedImages(Images):
    """Pictures of any sizes, one behind the other; the channels of a pixel lie together, as resizing wants them.

    Attributes:
        pixels: uint8 [bytes of all of them]; may be a file that is mapped into memory.
        starts: int64 [N], where each begins.
        shapes: int64 [N, 3], channels, height and width.
        read_from: where they were read from, where that is known.
    """

    pixels: Tensor
    starts: np.ndarray[Any, np.dtype[np.int64]]
    shapes: np.ndarray[Any, np.dtype[np.int64]]
    read_from: Images | None = None
    in_memory = True

    def __len__(self) -> int:
        return len(self.starts)

    def items(self, positions: Sequence[int]) -> list[MemoryItem]:
        return [MemoryItem(self._pixels(position)) for position in positions]

    def _pixels(self, position: int) -> Tensor:
        start, (channels, height, width) = int(self.starts[position]), self.shapes[position].tolist()
        row = self.pixels[start : start + channels * height * width]
        return row.view(height, width, channels).permute(2, 0, 1)

    def subset(self, positions: Tensor) -> PackedImages:
        """Shares the pixels."""
        chosen = positions.numpy()
        origin = None if self.read_from is None else self.read_from.subset(positions)
        return PackedImages(self.pixels, self.starts[chosen], self.shapes[chosen], origin)

    @property
    def origin(self) -> Images:
        return self if self.read_from is None else self.read_from

    @property
    def array(self) -> Tensor | None:
        """A view of the pixels where all sizes are one and nothing lies between."""
        if not len(self) or (self.shapes != self.shapes[0]).any():
            return None
        each, (channels, height, width) = int(self.shapes[0].prod()), self.shapes[0].tolist()
        if (np.diff(self.starts) != each).any():
            return None
        first = int(self.starts[0])
        rows = self.pixels[first : first + each * len(self)].view(len(self), height, width, channels)
        return rows.permute(0, 3, 1, 2)

    @property
    def nbytes(self) -> int:
        return int(self.shapes.prod(axis=1).sum())


def packed(pictures: Iterable[Tensor]) -> PackedImages:
    """Pictures uint8 [C, H, W] of any sizes, copied one behind the other.

    Raises:
        DataError: there is not as much memory.
    """
    pixels, shapes = bytearray(), list[tuple[int, ...]]()
    try:
        for picture in pictures:
            # Grown in place: two copies of all pictures at a time would halve what fits.
            pixels += picture.permute(1, 2, 0).contiguous().numpy().tobytes()
            shapes.append(tuple(picture.shape))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise DataError(
            f"there is no memory left after {len(shapes):,} pictures of {len(pixels) / 2**30:.1f} GiB; set "
            "data.storage to stream, which reads pictures when they are needed"
        ) from error
    rows = np.asarray(shapes, dtype=np.int64).reshape(-1, 3)
    sizes = rows.prod(axis=1)
    held = torch.frombuffer(pixels, dtype=torch.uint8) if pixels else torch.empty(0, dtype=torch.uint8)
    return PackedImages(held, np.cumsum(sizes) - sizes, rows)


def read_all(images: Images) -> Images:
    """The same pictures in memory, at their own sizes, read now by a few threads.

    Raises:
        DataError: one cannot be read, or there is not as much memory.
    """
    if images.in_memory or not len(images):
        return images
    # Of a 32 x 32 JPEG's time little is spent in the decoder, outside the interpreter's lock; threads would lose by it.
    small = (images.nbytes or 0) < SMALL_FILE * len(images)
    pool = ThreadPoolExecutor(1 if small else min(32, os.cpu_count() or 1))
    try:
        chunks = pool.map(lambda chunk: _read(images, chunk), torch.arange(len(images)).split(CHUNK))
        return replace(packed(picture for chunk in chunks for picture in chunk), read_from=images)
    finally:
        pool.shutdown(cancel_futures=True)


def _read(images: Images, positions: Tensor) -> list[Tensor]:
    return [item.picture() for item in images.items(positions.tolist())]
