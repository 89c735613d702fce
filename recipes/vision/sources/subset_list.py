"""Lists of the images to train on, such as the 1% and 10% of ImageNet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .file_table import FileTable
from .text_file import LINE_END, read_text


def read_subset(path: Path, files: FileTable) -> Tensor:
    """Sorted positions (int64) in `files` of the images that the text file `path` names, one a line.

    A line is a path below the root, or its end where that is unique, the bare name of the file say. Blank lines do not
    count. Raises DataError, naming the line, on an image that is not there, that several files fit or that an earlier
    line names, and if no line names any.
    """
    wanted: dict[str, int] = {}
    for number, line in enumerate(LINE_END.split(read_text(path)), 1):
        name = line.strip().replace("\\", "/").removeprefix("./")
        if name in wanted:
            raise DataError(f"{path}: line {number} names {name}, as line {wanted[name]} does: keep one of them")
        if name:
            wanted[name] = number
    if not wanted:
        raise DataError(f"{path} names no image: write one a line, as a path below {files.root}")
    found = _found(wanted, files)
    chosen: dict[int, str] = {}
    for name, number in wanted.items():
        fitting = found.get(name, [])
        if not fitting:
            raise DataError(f"{path}: line {number} names {name}, which is not among the {len(files):,} images")
        if len(fitting) > 1:
            one, other = (files.relative(position) for position in fitting[:2])
            raise DataError(f"{path}: line {number} names {name}, which may be {one} or {other}: write its whole path")
        if fitting[0] in chosen:
            first = chosen[fitting[0]]
            raise DataError(
                f"{path}: line {number} names {name}, which line {wanted[first]} names as {first}: keep one of them"
            )
        chosen[fitting[0]] = name
    return torch.from_numpy(np.sort(np.fromiter(chosen, dtype=np.int64)))


def _found(wanted: dict[str, int], files: FileTable) -> dict[str, list[int]]:
    """Name -> the positions that it fits, at most two: the file of that path, or else those whose paths end so."""
    exact: dict[str, list[int]] = {}
    ends: dict[str, list[int]] = {}
    for position in range(len(files)):
        relative = files.relative(position)
        if relative in wanted:
            exact[relative] = [position]
        for end in _ends(relative):
            if end in wanted and len(there := ends.setdefault(end, [])) < 2:
                there.append(position)
    return ends | exact


def _ends(relative: str) -> Iterator[str]:
    """What follows each slash."""
    start = relative.find("/")
    while start >= 0:
        yield relative[start + 1 :]
        start = relative.find("/", start + 1)
