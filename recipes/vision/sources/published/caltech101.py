"""Caltech-101: 30 random images of each class for train and val, the rest for test."""

from __future__ import annotations

from pathlib import Path

import torch

from ...errors import DataError
from ..sources import Request, Source
from ..splits import FIXED_TRAIN_STREAM, shuffled_strata, stream
from .reading import file_source

FOR_TRAINING = 30
BACKGROUND = "BACKGROUND_Google"


def open_caltech101(request: Request) -> Source:
    """Caltech-101 without its background class; train: 30 images of each class by `request.split_seed`; test: the rest.

    Raises DataError if a class has no image left for the test.
    """
    from torchvision.datasets import Caltech101

    folder = request.root / "caltech101" / "101_ObjectCategories"
    if not (folder / BACKGROUND).is_dir():
        raise DataError(f"the folder {folder / BACKGROUND} is missing")
    listed = Caltech101(request.root)
    files = [
        folder / listed.categories[label] / f"image_{number:04d}.jpg"
        for label, number in zip(listed.y, listed.index, strict=True)
    ]
    labels = torch.tensor(listed.y, dtype=torch.int64)
    classes = tuple(listed.categories)
    generator = stream(request.split_seed, FIXED_TRAIN_STREAM)
    groups = shuffled_strata(torch.arange(len(files)), labels, len(classes), generator)
    for name, group in zip(classes, groups, strict=True):
        if len(group) <= FOR_TRAINING:
            raise DataError(f"{folder / name} holds {len(group)} images, at least {FOR_TRAINING + 1} are needed")
    chosen = {
        "train": torch.cat([group[:FOR_TRAINING] for group in groups]).sort().values,
        "test": torch.cat([group[FOR_TRAINING:] for group in groups]).sort().values,
    }
    parts: dict[str, tuple[list[Path], torch.Tensor]] = {
        part: ([files[position] for position in positions.tolist()], labels[positions])
        for part, positions in chosen.items()
    }
    return file_source("caltech101", classes, parts, request, lists=dict.fromkeys(parts, folder))
