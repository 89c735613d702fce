"""N pictures, each at its own size, and where one of them is read from."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .decoding import decode

END = 4096
"""Bytes at the beginning and at the end of a file that are compared before the whole."""

Numbers = np.ndarray[Any, np.dtype[np.int64]]


class Item(ABC):
    """Where one picture is read from: a small value that travels to a worker process, which alone reads it."""

    original: tuple[int, int] | None = None
    """Height and width (px) of the picture that this one was reduced from, by which boxes are found; None: it is whole.
    """

    @abstractmethod
    def picture(self) -> Tensor:
        """The whole picture at its own size: uint8 [1 or 3, H, W].

        Raises:
            DataError: it cannot be read; the message names the file.
        """


class EncodedItem(Item):
    """A picture that lies somewhere as the bytes of an image file."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The file, for messages."""

    @abstractmethod
    def content(self) -> bytes:
        """Those bytes. Raises DataError, naming the file, where they cannot be read."""

    def ends(self) -> bytes:
        """The first and the last `END` bytes; all of a file that has no more. Raises DataError as `content` does."""
        return ends_of(self.content())

    def picture(self) -> Tensor:
        return decode(self.content(), self.name)


def ends_of(content: bytes) -> bytes:
    """The first and the last `END` bytes; all of them where there are no more."""
    return content if len(content) <= 2 * END else content[:END] + content[-END:]


class Images(ABC):
    """N pictures in a fixed order, each at its own size.

    Only the items of a few pictures ever go to a worker process, never the whole.
    """

    in_memory: bool = False
    """Whether reading one is so cheap that no worker process is worth its start."""

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def items(self, positions: Sequence[int]) -> Sequence[Item]:
        """Where the pictures at `positions` are read from."""

    @abstractmethod
    def subset(self, positions: Tensor) -> Images:
        """Those at `positions` (int64), in that order."""

    @property
    def origin(self) -> Images:
        """What they were read from, picture by picture; themselves where they were not copied from elsewhere."""
        return self

    @property
    def array(self) -> Tensor | None:
        """All of them as one tensor, uint8 [N, 1 or 3, H, W], where they lie in memory at one size; else None."""
        return None

    @property
    def nbytes(self) -> int | None:
        """Bytes that they take where they lie, as files or in memory; None where nobody has counted."""
        return None

    def fingerprint(self) -> str | None:
        """What stands for their contents without reading them: paths, sizes and times of modification, hashed.

        None where nobody can tell, as of somebody's Dataset. Raises DataError where a file is missing.
        """
        return None

    def folders(self) -> tuple[str, ...]:
        """The folders that they lie in; none for those in memory."""
        return ()

    def at(self, position: int) -> Tensor:
        """The picture at one position, read now: uint8 [1 or 3, H, W]."""
        return self.items([position])[0].picture()

    def stacked(self) -> Tensor:
        """All of them as one tensor, read now: uint8 [N, C, H, W]. Raises RuntimeError where sizes differ."""
        array = self.array
        return torch.stack([self.at(position) for position in range(len(self))]) if array is None else array


class EncodedImages(Images):
    """Pictures that lie somewhere as the bytes of image files; their items are of the kind `EncodedItem`."""

    @abstractmethod
    def items(self, positions: Sequence[int]) -> Sequence[EncodedItem]: ...

    @abstractmethod
    def file_name(self, position: int) -> str:
        """What tells one from all others of its source, wherever that lies: a path below the source's folder."""

    @property
    @abstractmethod
    def file_sizes(self) -> Numbers:
        """int64 [N], bytes of each; -1 where nobody has looked. Raises DataError where a file is missing."""

    @property
    @abstractmethod
    def mtimes(self) -> Numbers:
        """int64 [N], when the file that holds each was modified (ns). Raises DataError where it is missing."""


def below(paths: Sequence[str]) -> list[str]:
    """The same paths from the folder on that all of them lie below."""
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    return [os.path.relpath(os.path.abspath(path), folder) for path in paths]


def modified(paths: Sequence[str], file: np.ndarray[Any, np.dtype[np.int32]]) -> Numbers:
    """int64 [N], when `paths[file[i]]` was modified (ns). Raises DataError where one of those is missing."""
    times = np.zeros(len(paths), dtype=np.int64)
    for index in map(int, np.unique(file)):
        path = paths[index]
        try:
            times[index] = os.stat(path).st_mtime_ns
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}): put it back") from error
    return times[file]
