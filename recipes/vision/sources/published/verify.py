"""Whether a published data set on disk is whole: its files, counts and labels, and a sample of its images."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ..sources import Purpose, Request, Source
from .dataset import Dataset, open_dataset, remedy

SIDE = 32
CHUNK = 256


@dataclass
class Verified:
    """What was found: images counted and decoded, and the problems, each a message that names a file."""

    counted: int = 0
    decoded: int = 0
    problems: list[str] = field(default_factory=list)


def _sample(count: int, sample: int | None, seed: int) -> Tensor:
    """Sorted positions of `sample` random images; of all for None."""
    if sample is None or sample >= count:
        return torch.arange(count)
    return torch.from_numpy(np.sort(np.random.default_rng(seed).choice(count, sample, replace=False)))


def _broken(source: Source, positions: Tensor) -> list[str]:
    """What the images at `positions` that cannot be decoded raise."""
    problems = []
    for item in source.images.items(positions.tolist()):
        try:
            item.picture()
        except DataError as error:
            problems.append(str(error))
    return problems


def verify(dataset: Dataset, root: Path, *, sample: int | None, seed: int = 0) -> Verified:
    """Check the files, counts and labels of `dataset` below `root`, and decode `sample` of its images (None: all).

    Images are chosen by `seed` out of all parts. Problems are returned, not raised; files and folders that are missing
    are one problem, and then the only one.
    """
    found = Verified()
    missing = dataset.missing(root)
    if missing:
        names = ", ".join(map(str, missing))
        found.problems.append(
            f"missing are {len(missing)} of {len(dataset.needs)} files and folders: {names}; {remedy(dataset, root)}"
        )
        return found
    purposes: tuple[Purpose, ...] = ("downstream", "pretext") if dataset.has_unlabelled else ("downstream",)
    for purpose in purposes:
        try:
            source = open_dataset(dataset, Request(root, False, purpose))
        except DataError as error:
            found.problems.append(str(error))
            continue
        count = sum(len(positions) for positions in source.parts.values())
        found.counted += count
        positions = _sample(count, sample, seed)
        for chunk in positions.split(CHUNK):
            found.problems += _broken(source, chunk)
        found.decoded += len(positions)
    return found
