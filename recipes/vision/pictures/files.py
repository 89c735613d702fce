"""Pictures in files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..errors import DataError
from ..sources.file_table import FileTable
from .base import EncodedItem, Images


def of_parts(paths: Sequence[str], *arrays: np.ndarray) -> str:
    """A fingerprint of pictures that are parts of files: SHA-256 of these, their sizes and times, and of what is where.

    Raises:
        DataError: a file is missing.
    """
    content = hashlib.sha256(FileTable.of(os.sep, map(os.path.abspath, paths)).fingerprint().encode())
    for array in arrays:
        content.update(np.ascontiguousarray(array).tobytes())
    return content.hexdigest()


@dataclass(frozen=True)
class FileItem(EncodedItem):
    """A picture in a file of its own."""

    path: str

    @property
    def name(self) -> str:
        return self.path

    def content(self) -> bytes:
        try:
            with open(self.path, "rb") as file:
                return file.read()
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be read ({error.strerror}): it was there when the images were listed; put it back"
            ) from error


@dataclass(frozen=True, eq=False)
class FileImages(Images):
    """The files of a table, decoded when they are read."""

    files: FileTable

    def __len__(self) -> int:
        return len(self.files)

    def items(self, positions: Sequence[int]) -> list[FileItem]:
        return [FileItem(self.files.path(position)) for position in positions]

    def subset(self, positions: Tensor) -> FileImages:
        return FileImages(self.files.select(positions))

    @property
    def nbytes(self) -> int:
        return int(self.files.sizes.sum())

    def fingerprint(self) -> str:
        return self.files.fingerprint()

    def folders(self) -> tuple[str, ...]:
        return (self.files.root,)
