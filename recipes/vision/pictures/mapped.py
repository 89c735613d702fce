"""Decoded pictures in one file that every process maps into memory."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .base import Images, Item

OPEN_FILES = 64
START, CHANNELS, HEIGHT, WIDTH, ORIGINAL_HEIGHT, ORIGINAL_WIDTH, CHECK = range(7)
"""Columns of `MappedImages.rows`."""


class PixelFile:
    """A file of pixels, mapped into this process's memory.

    Raises:
        DataError: it cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            # Copy-on-write: torch takes no read-only arrays, and nothing writes, so that pages stay shared.
            self.pixels = torch.from_numpy(np.memmap(path, np.uint8, mode="c"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}): {remedy(path)}") from error
        self._checked = bytearray()

    def picture(self, position: int, start: int, shape: Sequence[int], check: int) -> Tensor:
        """The picture that begins at byte `start`, rows of pixels: uint8 [C, H, W], which shares the file's memory.

        The first time that this process reads it, its bytes are compared with `check`, their CRC-32. Raises DataError
        where they are others.
        """
        channels, height, width = shape
        row = self.pixels[start : start + channels * height * width]
        if position >= len(self._checked):
            self._checked.extend(bytes(position + 1 - len(self._checked)))
        if not self._checked[position]:
            if len(row) != channels * height * width or zlib.crc32(row.numpy().tobytes()) != check:
                raise DataError(f"{self.path} is damaged at picture {position}: {remedy(self.path)}")
            self._checked[position] = 1
        return row.view(height, width, channels).permute(2, 0, 1)


def remedy(path: str) -> str:
    """What to do about a damaged file of a cache."""
    return f"delete the folder {os.path.dirname(path)}, and it is made anew"


@lru_cache(maxsize=OPEN_FILES)
def pixel_file(path: str) -> PixelFile:
    """A file, mapped once a process."""
    return PixelFile(path)


@dataclass(frozen=True)
class MappedItem(Item):
    """Picture `position` of a file of pixels."""

    path: str
    position: int
    start: int
    shape: tuple[int, int, int]
    check: int
    original: tuple[int, int] | None

    def picture(self) -> Tensor:
        return pixel_file(self.path).picture(self.position, self.start, self.shape, self.check)


@dataclass(frozen=True, eq=False)
class MappedImages(Images):
    """Pictures in one file of pixels, whole or reduced.

    They do not count as being in memory: to cut crops from them is work that other processes can do.

    Attributes:
        path: the file.
        rows: int64 [N, 7]: where each begins, its channels, height and width, the height and width of its original, and
            the CRC-32 of its bytes.
        positions: int64 [n], which of them.
        read_from: the n pictures that they were made from, where that is known.
    """

    path: str
    rows: np.ndarray[Any, np.dtype[np.int64]]
    positions: np.ndarray[Any, np.dtype[np.int64]]
    read_from: Images | None = None

    def __len__(self) -> int:
        return len(self.positions)

    def items(self, positions: Sequence[int]) -> list[MappedItem]:
        return [self._item(int(self.positions[position])) for position in positions]

    def _item(self, at: int) -> MappedItem:
        start, channels, height, width, *original, check = self.rows[at].tolist()
        whole = original == [height, width]
        shape = channels, height, width
        return MappedItem(self.path, at, start, shape, check, None if whole else (original[0], original[1]))

    def subset(self, positions: Tensor) -> MappedImages:
        """Shares the rows."""
        origin = None if self.read_from is None else self.read_from.subset(positions)
        return replace(self, positions=self.positions[positions.numpy()], read_from=origin)

    @property
    def origin(self) -> Images:
        return self if self.read_from is None else self.read_from

    @property
    def reduced(self) -> bool:
        """Whether any picture is smaller than its original."""
        sizes = self.rows[self.positions, HEIGHT:CHECK]
        return bool((sizes[:, :2] != sizes[:, 2:]).any())

    @property
    def nbytes(self) -> int:
        return int(self.rows[self.positions, CHANNELS : WIDTH + 1].prod(axis=1).sum())
