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
from .base import END, EncodedImages, EncodedItem, Numbers


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
            raise self._unreadable(error) from error

    def ends(self) -> bytes:
        try:
            with open(self.path, "rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size <= 2 * END:
                    return file.read()
                first = file.read(END)
                file.seek(-END, os.SEEK_END)
                return first + file.read(END)
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> DataError:
        return DataError(
            f"{self.path} cannot be read ({error.strerror}): it was there when the images were listed; put it back"
        )


@dataclass(frozen=True, eq=False)
class FileImages(EncodedImages):
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

    def file_name(self, position: int) -> str:
        return self.files.relative(position)

    @property
    def file_sizes(self) -> Numbers:
        return self.files.sizes

    @property
    def mtimes(self) -> Numbers:
        return self.files.mtimes
