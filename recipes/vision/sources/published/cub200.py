"""Caltech-UCSD Birds-200-2011 from its published text files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...errors import DataError
from ..sources import Request, Source
from .reading import fields, file_source, reading


def _column(file: Path, ids: list[str]) -> list[int]:
    """The number that `file` gives each of `ids`. Raises DataError unless it gives one to each."""
    rows = dict(fields(file, 2))
    absent = [identity for identity in ids if identity not in rows]
    if absent:
        raise DataError(f"{file} has no entry for image {absent[0]}")
    with reading(file):
        return [int(rows[identity]) for identity in ids]


def open_cub200(request: Request) -> Source:
    """CUB-200-2011: train and test by train_test_split.txt.

    images.txt: id, path below images/; image_class_labels.txt: id, class from 1; classes.txt: class, name;
    train_test_split.txt: id, 1 for train and 0 for test.
    """
    folder = request.root / "CUB_200_2011"
    entries = fields(folder / "images.txt", 2)
    ids = [identity for identity, _ in entries]
    files = [folder / "images" / path for _, path in entries]
    labels = torch.tensor(_column(folder / "image_class_labels.txt", ids), dtype=torch.int64) - 1
    split = _column(folder / "train_test_split.txt", ids)
    wrong = [(identity, value) for identity, value in zip(ids, split, strict=True) if value not in (0, 1)]
    if wrong:
        identity, value = wrong[0]
        raise DataError(f"{folder / 'train_test_split.txt'} gives image {identity} the part {value}, not 0 or 1")
    classes = [name.partition(".")[2].replace("_", " ") for _, name in fields(folder / "classes.txt", 2)]
    parts: dict[str, tuple[list[Path], Tensor]] = {}
    for part, mark in (("train", 1), ("test", 0)):
        chosen = [position for position, value in enumerate(split) if value == mark]
        parts[part] = [files[position] for position in chosen], labels[chosen]
    lists = dict.fromkeys(parts, folder / "image_class_labels.txt")
    return file_source("cub200", classes, parts, request, lists=lists)
