"""Pictures in files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import DataError
from ..sources.file_table import FileTable
from .base import EncodedItem, Images


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
