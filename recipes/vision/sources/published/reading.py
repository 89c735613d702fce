"""What the readers of published data sets share: errors that name the file, and sources of files or of arrays."""

from __future__ import annotations

import os
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from xml.etree.ElementTree import ParseError

import torch
from torch import Tensor

from ...errors import DataError
from ...pictures.files import FileImages
from ...pictures.memory import ArrayImages
from ..file_table import FileTable
from ..sources import Request, Source

# What the parsers of text, JSON, XML and IDX files raise on damaged ones, torchvision's assertions included.
PARSE_ERRORS = (
    OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, AssertionError, MemoryError,
    ArithmeticError, struct.error, zlib.error, ParseError,
)  # fmt: skip


@contextmanager
def reading(*files: Path, errors: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Raise one DataError, naming the file, if one of `files` is missing or what the block does with them fails.

    `errors`: those of the block's parser, besides the usual ones.
    """
    for file in files:
        if not file.is_file():
            raise DataError(f"the file {file} is missing")
    try:
        yield
    except DataError:
        raise
    except (*PARSE_ERRORS, *errors) as error:
        said = str(error) or type(error).__name__
        names = " or ".join(str(file) for file in files)
        raise DataError(f"{names} is damaged or of another format ({said})") from error


def lines(file: Path) -> list[str]:
    """The lines of a text file that are not blank. Raises DataError if it is missing or not text."""
    with reading(file):
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def fields(file: Path, count: int) -> list[list[str]]:
    """The lines of a text file, each of `count` words; the last word may hold blanks. Raises DataError otherwise."""
    rows = [line.split(maxsplit=count - 1) for line in lines(file)]
    for number, row in enumerate(rows, 1):
        if len(row) != count:
            raise DataError(f"{file} is damaged: entry {number} reads {' '.join(row)!r}, not {count} words")
    return rows


def check_files(files: Iterable[Path], lists: Path) -> None:
    """Raise DataError, naming the first, unless all `files` are there; `lists` is the file or folder of their names."""
    folders: dict[Path, list[str]] = defaultdict(list)
    for file in files:
        folders[file.parent].append(file.name)
    missing: list[Path] = []
    for folder, names in folders.items():
        # One listing a folder: asking for each of 100,000 files takes minutes on a network disk.
        there = set(os.listdir(folder)) if folder.is_dir() else set()
        missing += [folder / name for name in names if name not in there]
    if missing:
        raise DataError(f"{lists} names {len(missing):,} image(s) that are missing, the first is {missing[0]}")


def _positions(sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """The positions of parts that lie one behind the other."""
    first, positions = 0, {}
    for part, size in sizes.items():
        positions[part] = torch.arange(first, first + size)
        first += size
    return positions


def file_source(
    name: str,
    classes: Sequence[str],
    parts: Mapping[str, tuple[Sequence[Path], Tensor]],
    request: Request,
    *,
    lists: Mapping[str, Path],
) -> Source:
    """A source of image files that are decoded when they are read; `parts`: part -> files and their labels.

    `lists`: part -> the file or folder that names them. Raises DataError, naming the file, on a missing image and on
    a class that is not in 0 .. len(classes) - 1.
    """
    for part, (files, labels) in parts.items():
        check_files(files, lists[part])
        if labels.dtype == torch.int64:
            wrong = ((labels < 0) | (labels >= len(classes))).nonzero()
            if len(wrong):
                position = int(wrong[0])
                raise DataError(
                    f"{lists[part]} gives {files[position].name} the class {int(labels[position])}, counted from 0, "
                    f"but {len(classes)} classes run from 0 to {len(classes) - 1}"
                )
    relative = [os.path.relpath(file, request.root) for files, _ in parts.values() for file in files]
    labels = torch.cat([labels for _, labels in parts.values()])
    sizes = {part: len(files) for part, (files, _) in parts.items()}
    images = FileImages(FileTable.of(request.root, relative))
    return Source(name, tuple(classes), labels, _positions(sizes), images, "down")


def array_source(name: str, classes: Sequence[str], parts: Mapping[str, tuple[Tensor, Tensor]]) -> Source:
    """A source of images in memory; `parts`: part -> uint8 [n, C, H, W] and their labels."""
    images = ArrayImages(torch.cat([images for images, _ in parts.values()]))
    labels = torch.cat([labels for _, labels in parts.values()])
    sizes = {part: len(images) for part, (images, _) in parts.items()}
    return Source(name, tuple(classes), labels, _positions(sizes), images, "down")
