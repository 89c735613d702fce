"""Pictures that are members of uncompressed tar files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import DataError
from .base import END, EncodedImages, EncodedItem, below, modified
from .files import of_parts

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class TarItem(EncodedItem):
    """`size` bytes from `start` on in the file `shard`, which its table of contents calls `member`."""

    shard: str
    start: int
    size: int
    member: str

    @property
    def name(self) -> str:
        return f"{self.shard}: {self.member}"

    def content(self) -> bytes:
        return self._read(self.start, self.size)

    def ends(self) -> bytes:
        if self.size <= 2 * END:
            return self.content()
        return self._read(self.start, END) + self._read(self.start + self.size - END, END)

    def _read(self, start: int, size: int) -> bytes:
        try:
            with open(self.shard, "rb", buffering=0) as file:
                file.seek(start)
                content = file.read(size)
        except OSError as error:
            raise DataError(
                f"{self.shard} cannot be read ({error.strerror}): it was there when the images were listed; put it back"
            ) from error
        if len(content) != size:
            raise DataError(f"{self.name} is cut short: the file changed after its images were listed; put it back")
        return content


@dataclass(frozen=True, eq=False)
class TarImages(EncodedImages):
    """Members of tar files, decoded when they are read.

    Attributes:
        shards: the files.
        shard: int32 [N], positions in `shards`.
        starts: int64 [N], where each member's bytes begin.
        sizes: int64 [N], how many they are.
        names: uint8, the members' names one behind the other, in UTF-8.
        name_starts: int64 [N], where each begins.
        name_sizes: int32 [N], how many bytes it has.
    """

    shards: tuple[str, ...]
    shard: np.ndarray[Any, np.dtype[np.int32]]
    starts: Ints
    sizes: Ints
    names: np.ndarray[Any, np.dtype[np.uint8]]
    name_starts: Ints
    name_sizes: np.ndarray[Any, np.dtype[np.int32]]

    def __len__(self) -> int:
        return len(self.shard)

    def items(self, positions: Sequence[int]) -> list[TarItem]:
        return [
            TarItem(self.shards[self.shard[at]], int(self.starts[at]), int(self.sizes[at]), self.member(at))
            for at in positions
        ]

    def member(self, position: int) -> str:
        """The name of one in its shard."""
        start = int(self.name_starts[position])
        return self.names[start : start + int(self.name_sizes[position])].tobytes().decode("utf-8", "replace")

    def subset(self, positions: Tensor) -> TarImages:
        """Shares the names."""
        chosen = positions.numpy()
        rows = ("shard", "starts", "sizes", "name_starts", "name_sizes")
        return replace(self, **{field: getattr(self, field)[chosen] for field in rows})

    @property
    def nbytes(self) -> int:
        return int(self.sizes.sum())

    def fingerprint(self) -> str:
        return of_parts(self.shards, self.shard, self.starts, self.sizes)

    def folders(self) -> tuple[str, ...]:
        return tuple(sorted({os.path.dirname(shard) for shard in self.shards}))

    @cached_property
    def _shard_names(self) -> list[str]:
        return below(self.shards)

    def file_name(self, position: int) -> str:
        return f"{self._shard_names[self.shard[position]]}: {self.member(position)}"

    @property
    def file_sizes(self) -> Ints:
        return self.sizes

    @property
    def mtimes(self) -> Ints:
        return modified(self.shards, self.shard)
