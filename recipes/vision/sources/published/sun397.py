"""SUN397: the first of its ten published partitions."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...errors import DataError
from ..sources import Request, Source
from .reading import file_source, lines


def open_sun397(request: Request) -> Source:
    """SUN397: Training_01.txt as train, Testing_01.txt as test, 50 images of each class in either.

    Each line is a path like /a/abbey/sun_x.jpg below the set's folder; ClassName.txt lists the classes, /a/abbey.
    """
    folder = request.root / "SUN397"
    names = lines(folder / "ClassName.txt")
    index = {name: label for label, name in enumerate(names)}
    lists = {"train": folder / "Training_01.txt", "test": folder / "Testing_01.txt"}
    parts: dict[str, tuple[list[Path], Tensor]] = {}
    for part, file in lists.items():
        paths = lines(file)
        labels = []
        for path in paths:
            name = path.rpartition("/")[0]
            if name not in index:
                raise DataError(f"{file} names {path}, whose class {name!r} is not in {folder / 'ClassName.txt'}")
            labels.append(index[name])
        parts[part] = [folder / path.lstrip("/") for path in paths], torch.tensor(labels, dtype=torch.int64)
    # "/o/office/indoor" -> "office/indoor": the first folder is only the initial.
    classes = [name.lstrip("/").partition("/")[2] for name in names]
    return file_source("sun397", classes, parts, request, lists=lists)
