"""Pictures in a column of Arrow files, as `datasets` keeps them: the bytes of an image file, or the path of one."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import DataError
from .base import EncodedImages, EncodedItem, Numbers, below, modified
from .files import of_parts

OPEN_FILES = 1024


def optional_package(name: str) -> Any:
    """A module that the extra `hf` brings. Raises DataError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(f"hf:PATH needs the package {name.partition('.')[0]}: pip install 'bilevel[hf]'") from error


@lru_cache(maxsize=OPEN_FILES)
def arrow_table(path: str) -> Any:
    """The table in an Arrow stream file, mapped into memory; opened once a process.

    Raises:
        DataError: the file is missing or damaged, or pyarrow is not installed.
    """
    pyarrow = optional_package("pyarrow")
    try:
        return pyarrow.ipc.open_stream(pyarrow.memory_map(path)).read_all()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{path} cannot be read ({error}): it is missing or damaged; save the data set again"
        ) from error


@dataclass(frozen=True)
class ArrowItem(EncodedItem):
    """What one row of an Arrow file holds in `column`."""

    path: str
    column: str
    row: int

    @property
    def name(self) -> str:
        return f"{self.path}: row {self.row}"

    def content(self) -> bytes:
        value = arrow_table(self.path).column(self.column)[self.row].as_py()
        if isinstance(value, dict):
            value = value["path"] if value["bytes"] is None else value["bytes"]
        if isinstance(value, bytes):
            return value
        try:
            with open(value, "rb") as file:
                return file.read()
        except OSError as error:
            raise DataError(
                f"{self.name} names the file {value}, which cannot be read ({error.strerror}): put it back, or save "
                "the data set anew by save_to_disk, which takes the files into it"
            ) from error


@dataclass(frozen=True, eq=False)
class ArrowImages(EncodedImages):
    """Rows of Arrow files, decoded when they are read.

    Attributes:
        paths: the files.
        column: which of theirs.
        file: int32 [N], positions in `paths`.
        rows: int64 [N], in that file.
        sizes: int64 [N], bytes of each picture; -1 for one that lies in a file of its own.
    """

    paths: tuple[str, ...]
    column: str
    file: np.ndarray[Any, np.dtype[np.int32]]
    rows: np.ndarray[Any, np.dtype[np.int64]]
    sizes: np.ndarray[Any, np.dtype[np.int64]]

    def __len__(self) -> int:
        return len(self.rows)

    def items(self, positions: Sequence[int]) -> list[ArrowItem]:
        return [ArrowItem(self.paths[self.file[at]], self.column, int(self.rows[at])) for at in positions]

    def subset(self, positions: Tensor) -> ArrowImages:
        chosen = positions.numpy()
        return replace(self, file=self.file[chosen], rows=self.rows[chosen], sizes=self.sizes[chosen])

    @property
    def nbytes(self) -> int | None:
        return None if (self.sizes < 0).any() else int(self.sizes.sum())

    def fingerprint(self) -> str | None:
        """None where pictures lie in files of their own, which a table only names."""
        return None if (self.sizes < 0).any() else of_parts(self.paths, self.file, self.rows)

    def folders(self) -> tuple[str, ...]:
        return tuple(sorted({os.path.dirname(path) for path in self.paths}))

    @cached_property
    def _file_names(self) -> list[str]:
        return below(self.paths)

    def file_name(self, position: int) -> str:
        return f"{self._file_names[self.file[position]]}: row {self.rows[position]}"

    @property
    def file_sizes(self) -> Numbers:
        return self.sizes

    @property
    def mtimes(self) -> Numbers:
        return modified(self.paths, self.file)
