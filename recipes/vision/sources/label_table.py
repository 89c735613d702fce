"""The table in labels.csv: which image has which values, as the many programs write it that write such tables."""

from __future__ import annotations

import csv
import io
import os
import re
import stat
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .file_table import FileScan, FileTable
from .folders import PART_NAMES, SUFFIXES, part_of
from .text_file import read_text

SPLIT = "split"
DELIMITERS = re.compile(r"[,;\t]")
QUOTED = re.compile(r'"[^"]*"')
EXAMPLE = "such as the line file,label"


@dataclass(frozen=True, eq=False)
class LabelTable:
    """N images and their values in C columns; what is wrong with a value is said by `refuse`.

    `texts[codes[i, c]]` is the value of image i in `columns[c]`; `codes`: int64 [N, C]. `parts`: positions (int64) of
    "train" and, where a column `split` says so, "val" and "test".
    """

    file: Path
    files: FileTable
    columns: tuple[str, ...]
    texts: tuple[str, ...]
    codes: np.ndarray
    rows: np.ndarray
    parts: dict[str, Tensor]
    decimal_comma: bool

    def refuse(self, text: str, problem: str) -> DataError:
        """An error that says where the value `text` stands first, and that it `problem`."""
        position, column = np.argwhere(self.codes == self.texts.index(text))[0]
        name = self.columns[column]
        return DataError(f"{self.file}: row {self.rows[position]}, column {name!r}: {problem}")


def read_label_table(folder: Path, file: Path) -> LabelTable:
    """The table in `file`, whose first column names images by their paths below `folder`.

    Columns are separated by commas, semicolons or tabs, as the header is; a decimal comma counts with semicolons. Rows
    and columns at the end that are empty are left out. Rows are numbered as in the file, blank lines and line breaks
    between quotes included. Raises DataError, naming the row or column, on a table without a header, with a column
    that has no name or that of another, or a row of another length; on an image that is missing, not below the folder
    or listed twice; and on a column `split` with other words than train, val and test.
    """
    text = read_text(file)
    delimiter = _delimiter(text)
    rows = _rows(file, text, delimiter)
    names = _header(folder, file, next(rows, (1, []))[1])
    splits = [position for position, name in enumerate(names) if position and name.casefold() == SPLIT]
    columns = [position for position in range(1, len(names)) if position not in splits]
    if len(splits) > 1 or not columns:
        raise DataError(f"{file} needs one column or more for the labels, and at most one called {SPLIT}")
    scan = FileScan(folder, ())
    first_rows: dict[str, int] = {}
    codes, known, numbers = array("q"), dict[str, int](), array("q")
    members: dict[str, array[int]] = {part: array("q") for part in PART_NAMES}
    for row, cells in rows:
        while len(cells) > len(names) and not cells[-1].strip():
            cells.pop()
        if len(cells) != len(names):
            raise DataError(f"{file}: row {row} has {len(cells)} values, but the header has {len(names)}")
        relative, found = _image(folder, file, row, cells[0])
        if relative in first_rows:
            raise DataError(
                f"{file} lists {relative} twice, in rows {first_rows[relative]} and {row}: keep one row an image"
            )
        first_rows[relative] = row
        members[_part(file, row, cells[splits[0]]) if splits else "train"].append(len(scan))
        scan.add(relative, found)
        numbers.append(row)
        codes.extend(known.setdefault(cells[column].strip(), len(known)) for column in columns)
    if not len(scan):
        raise DataError(f"{file} needs a header, {EXAMPLE}, and a row for each image")
    if not members["train"]:
        raise DataError(f"{file}: column {names[splits[0]]!r} leaves no image to the train part")
    return LabelTable(
        file,
        scan.table(),
        tuple(names[column] for column in columns),
        tuple(known),
        np.asarray(codes).reshape(-1, len(columns)),
        np.asarray(numbers),
        {part: torch.from_numpy(np.asarray(there)) for part, there in members.items() if there},
        delimiter == ";",
    )


def _delimiter(text: str) -> str:
    """The first of the three that stands in the header outside of quotes; the name of its first column has none."""
    for line in re.finditer(r"[^\r\n]+", text):
        if DELIMITERS.sub("", line[0]).strip():
            found = DELIMITERS.search(QUOTED.sub("", line[0]))
            return found[0] if found else ","
    return ","


def _rows(file: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not empty, each with the number of the line in which it begins."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        row = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{file}: row {row} cannot be read ({error}): mend its quotes") from error
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            yield row, cells


def _header(folder: Path, file: Path, cells: Sequence[str]) -> list[str]:
    """The names of the columns. Raises DataError if they are none."""
    names = [cell.strip() for cell in cells]
    while names and not names[-1]:
        names.pop()
    if names:
        first = names[0].replace("\\", "/")
        if PurePosixPath(first).suffix.lower() in SUFFIXES or os.path.isfile(os.path.join(folder, first)):
            raise DataError(f"{file} has no header: its first row names the image {names[0]}; put one above, {EXAMPLE}")
    if len(names) < 2:
        raise DataError(
            f"{file} needs a header, {EXAMPLE}, and a row for each image, separated by commas, semicolons or tabs"
        )
    for position, name in enumerate(names):
        if not name:
            raise DataError(f"{file}: column {position + 1} has no name in the header: give it one or remove it")
        if name in names[:position]:
            raise DataError(
                f"{file}: columns {names.index(name) + 1} and {position + 1} are both called {name!r}: rename one"
            )
    return names


def _image(folder: Path, file: Path, row: int, name: str) -> tuple[str, os.stat_result]:
    """The path below `folder` of the image that a row names, perhaps as Windows does. Raises DataError without one."""
    if not name.strip():
        raise DataError(f"{file}: row {row} names no image")
    slashed = name.strip().replace("\\", "/")
    if os.path.isabs(slashed) or ".." in slashed.split("/"):
        raise DataError(f"{file}: row {row} names {name}, which is not a path below the folder")
    for candidate in dict.fromkeys((name, name.strip(), slashed)):
        try:
            found = os.stat(os.path.join(folder, candidate))
        except OSError:
            continue
        if stat.S_ISREG(found.st_mode):
            return os.path.normpath(candidate), found
    raise DataError(f"{file}: row {row} names {folder / name.strip()}, which is missing")


def _part(file: Path, row: int, word: str) -> str:
    part = part_of(word.strip())
    if part is None:
        raise DataError(f"{file}: row {row}, column {SPLIT!r}: {word!r} is neither train, val nor test")
    return part
