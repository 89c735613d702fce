"""A folder of images whose labels are in one file, labels.csv: several classes an image, or targets of a regression."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DataError
from ..pictures.files import FileImages
from .file_table import FileTable
from .sources import Source

LABEL_FILE = "labels.csv"


def _rows(file: Path) -> list[list[str]]:
    """The table's rows, the header first. Raises DataError unless they all have the header's length."""
    try:
        with file.open(newline="", encoding="utf-8") as stored:
            rows = [row for row in csv.reader(stored) if row]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{file} cannot be read ({error}): it must be a table of comma-separated values") from error
    if len(rows) < 2 or len(rows[0]) < 2:
        raise DataError(f"{file} needs a header, file and one name or more for the labels, and a row for each image")
    for number, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            raise DataError(f"{file}: row {number} has {len(row)} values, but the header has {len(rows[0])}")
    return rows


def _labels(file: Path, rows: list[list[str]]) -> Tensor:
    """Bool [N, C] if every value reads 0 or 1, else float32 [N, C]. Raises DataError on a value that is no number."""
    if all(value.strip() in ("0", "1") for row in rows for value in row[1:]):
        return torch.tensor([[value.strip() == "1" for value in row[1:]] for row in rows])
    values: list[list[float]] = []
    for number, row in enumerate(rows, 2):
        try:
            values.append([float(value) for value in row[1:]])
        except ValueError as error:
            raise DataError(f"{file}: row {number} has a label that is no number ({error})") from error
    return torch.tensor(values, dtype=torch.float32)


def open_label_file(path: str) -> Source:
    """The images that labels.csv in the folder `path` lists, in its order; one part.

    The header is `file` and the names of the labels; each row is an image's path below `path` and a value a label.
    Values that all read 0 or 1 make a multi-label set, any others a regression (there write 1.0 for 1). Raises
    DataError, naming the file and row, on another table and on an image that is missing or listed twice.
    """
    folder = Path(path)
    header, *rows = _rows(folder / LABEL_FILE)
    names = [row[0] for row in rows]
    seen: set[str] = set()
    for number, name in enumerate(names, 2):
        if os.path.normpath(name) in seen:
            raise DataError(f"{folder / LABEL_FILE} lists {name} twice: keep one row an image")
        seen.add(os.path.normpath(name))
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise DataError(f"{folder / LABEL_FILE}: row {number} names {name}, which is not a path below the folder")
        if not os.path.isfile(folder / name):
            raise DataError(f"{folder / LABEL_FILE}: row {number} names {folder / name}, which is missing")
    labels = _labels(folder / LABEL_FILE, rows)

    images = FileImages(FileTable.of(folder, names))
    return Source(f"folder:{path}", tuple(header[1:]), labels, {"train": torch.arange(len(names))}, images)
