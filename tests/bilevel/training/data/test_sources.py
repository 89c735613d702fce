"""What can stand for a level's batches, and what is refused with the remedy."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset

from bilevel.training import Cycle, Level, LoaderSource
from tests.bilevel.training.data.data_sets import Points, Stream, loader


def test_the_explicit_class_takes_loaders_alone() -> None:
    for wrong in ([1], Points(), DataLoader):
        with pytest.raises(TypeError, match=r"^LoaderSource: loader must be a torch.utils.data.DataLoader, got "):
            LoaderSource(wrong)  # type: ignore[arg-type]
    for seed in (-1, 1.5, "x"):
        with pytest.raises(ValueError, match=r"^LoaderSource: seed must be a whole number of at least 0, or None to"):
            LoaderSource(loader(), seed=seed)  # type: ignore[arg-type]


def level(data: Any) -> Level:
    params = {"w": torch.zeros(2)}
    return Level(params, torch.optim.SGD(params.values(), 0.1), data)


def test_a_level_takes_a_loader_and_a_list_stays_a_cycle() -> None:
    assert isinstance(level(loader()).data, LoaderSource)
    source = LoaderSource(loader(), seed=1)
    assert level(source).data is source
    assert isinstance(level([1, 2]).data, Cycle)


class Mine:
    def __iter__(self) -> Iterator[int]:
        return iter([1, 2])


REFUSED: list[tuple[Any, str]] = [
    (torch.ones(4, 2), r"got Tensor; \[tensor\] is one batch .* DataLoader\(TensorDataset\(tensor\), .* cuts its rows"),
    (np.ones(3), r"got ndarray; \[tensor\] is one batch"),
    (TensorDataset(torch.ones(4)), r"got TensorDataset; wrap it: DataLoader\(dataset, batch_size=..., shuffle=True\)$"),
    (Stream(), r"got Stream; wrap it: DataLoader\(dataset, batch_size=...\), or batch_size=None where it gives whole"),
    (iter([1, 2]), r"got list_iterator; it can be gone through once: pass the DataLoader that it came from, list\("),
    ((i for i in range(3)), "got generator; it can be gone through once"),
    (iter(loader()), "got _SingleProcessDataLoaderIter; it can be gone through once"),
    (Mine(), r"got Mine; make its class an IterableDataset and pass DataLoader\(data, batch_size=None\), or list\("),
    ({"x": torch.ones(2)}, r"got dict; \[batch\] is one batch for every step$"),
    (range(3), r"got range; DataLoader\(data, batch_size=..., shuffle=True\) draws batches of its items"),
    (DataLoader, "got the class DataLoader; pass an instance$"),
    ("batches", "got str; a list is cycled through, and a DataLoader draws its batches anew in each pass$"),
    (None, "got NoneType; a list is cycled through"),
    ((torch.ones(2), torch.ones(2)), r"is a tuple of tensors, which looks like one batch; write \[batch\]"),
    (SequentialSampler(Points()), "got SequentialSampler; make its class an IterableDataset"),
]


@pytest.mark.parametrize(("data", "message"), REFUSED, ids=[message.split(";")[0] for _, message in REFUSED])
def test_everything_else_is_refused_with_the_remedy(data: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^Level: data (must be .*, )?{message}"):
        level(data)


LOADER = DataLoader(TensorDataset(torch.arange(4.0)), batch_size=2)

INSIDE: dict[str, tuple[Any, str]] = {
    "loaders": ([LOADER, LOADER], r"\[0\] is a DataLoader, .*pass it itself"),
    "a loader": ([LOADER], r"\[0\] is a DataLoader, .*pass it itself"),
    "a loader after a batch": ((torch.ones(2), LOADER), r"\[1\] is a DataLoader, "),
    "data sets": ([LOADER.dataset] * 2, r"\[0\] is a TensorDataset, .*pass DataLoader\(dataset"),
    "iterators": ([iter(LOADER), iter(LOADER)], r"\[0\] is a .*Iter, .*gone through once: pass list"),
    "a generator": ([(batch for batch in LOADER)], r"\[0\] is a generator, .*gone through once"),
    "sources": ([LoaderSource(LOADER), Cycle([None])], r"\[0\] is a LoaderSource, .*pass it itself"),
}


@pytest.mark.parametrize("kind", INSIDE)
def test_what_gives_batches_is_no_batch_within_a_list(kind: str) -> None:
    data, match = INSIDE[kind]
    with pytest.raises(TypeError, match=f"^Level: data{match}"):
        level(data)
    with pytest.raises(TypeError, match=f"^Cycle: batches{match}"):
        Cycle(data)
