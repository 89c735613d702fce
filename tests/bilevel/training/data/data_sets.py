"""Data sets and samplers of many kinds, for a DataLoader."""

import random
from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from bilevel.training import BatchSource


class Points(Dataset[Tensor]):
    """Each point's number, and draws from torch's, numpy's and Python's default generators: [4], float64."""

    def __init__(self, size: int = 10) -> None:
        self.size, self.loaded = size, 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        self.loaded += 1
        draws = [float(torch.rand((), dtype=torch.float64)), float(np.random.rand()), random.random()]
        return torch.tensor([float(index), *draws], dtype=torch.float64)


class Stream(IterableDataset[Tensor]):
    """The points of `Points` in a random order, each worker's its share; endless without a `size`."""

    def __init__(self, size: int | None = 10) -> None:
        self.size, self.begun = size, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.begun += 1
        order = count() if self.size is None else torch.randperm(self.size).tolist()
        info = get_worker_info()
        for index in order:
            if info is None or index % info.num_workers == info.id:
                yield Points()[index]


class Own(Points):
    """Draws from a generator of its own, which no seed reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.draws = np.random.default_rng(0)

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index), self.draws.random()], dtype=torch.float64)


class Shuffled:
    """A sampler of one's own, which draws as it goes, from the default generators."""

    def __init__(self, size: int = 10) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.size):
            yield (int(torch.randint(self.size, ())) + np.random.randint(self.size) + random.randrange(9)) % self.size

    def __len__(self) -> int:
        return self.size


def plain(batch: Any) -> Any:
    """A batch that can be compared by ``==``."""
    if isinstance(batch, Tensor):
        return batch.tolist()
    if isinstance(batch, dict):
        return {name: plain(item) for name, item in batch.items()}
    return [plain(item) for item in batch] if isinstance(batch, (list, tuple)) else batch


def drawn(source: BatchSource, number: int) -> list[Any]:
    return [plain(source.next()) for _ in range(number)]


def points_of(batches: list[Any]) -> list[int]:
    """The numbers of the points in batches of `Points`."""
    return [int(point[0]) for batch in batches for point in batch]


def loader(dataset: Any = None, **options: Any) -> DataLoader[Any]:
    """Of `Points` in shuffled batches of 3 where nothing else is said: 4 batches a pass."""
    dataset = Points() if dataset is None else dataset
    if not isinstance(dataset, IterableDataset) and not {"sampler", "batch_sampler", "shuffle"} & set(options):
        options["shuffle"] = True
    if "batch_sampler" not in options:
        options.setdefault("batch_size", 3)
    return DataLoader(dataset, **options)
