"""Orders that cannot be drawn again are said to be others when a source is resumed; those that can are not."""

import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from bilevel.training import LoaderSource
from tests.bilevel.training.data.data_sets import Own, Points, Shuffled, drawn, loader


def resumed_after(make: Callable[[], DataLoader[Any]], number: int) -> LoaderSource:
    source = LoaderSource(make(), seed=0)
    drawn(source, number)
    other = LoaderSource(make(), seed=0)
    other.load_state_dict(source.state_dict())
    return other


class OwnOrder(Shuffled):
    draws = random.Random()

    def __iter__(self) -> Iterator[int]:
        return iter(self.draws.sample(range(self.size), self.size))


class Carried(IterableDataset[Tensor]):
    """Goes on in a later pass where the one before has ended."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(6):
            self.at += 1
            yield torch.tensor(float(self.at))


INEXACT: dict[str, Callable[[], DataLoader[Any]]] = {
    "the dataset's own generator": lambda: loader(Own()),
    "the sampler's own generator": lambda: loader(sampler=OwnOrder()),
    "a stream that goes on": lambda: loader(Carried()),
    "as the workers are ready": lambda: loader(num_workers=2, in_order=False),
}


@pytest.mark.parametrize("make", INEXACT.values(), ids=INEXACT.keys())
def test_an_order_that_cannot_be_drawn_again_is_said_to_be_another_once(make: Callable[[], DataLoader[Any]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh = LoaderSource(make(), seed=0)
        drawn(fresh, 9)
    resumed = resumed_after(make, 6)
    with pytest.warns(UserWarning, match=r"^LoaderSource: the order of the batches is not .* generator of its own"):
        resumed.next()
    drawn(resumed, 5)
    resumed.load_state_dict(fresh.state_dict())
    resumed.next()


def test_other_data_are_said_to_be_others() -> None:
    state = {}
    for size in (10, 20):
        source = LoaderSource(loader(Points(size)), seed=0)
        if size == 10:
            drawn(source, 4)
            state = source.state_dict()
            continue
        source.load_state_dict(state)
        with pytest.warns(UserWarning, match="batch 3 of pass 0 .* The data have changed"):
            source.next()
    # Fewer batches than had been drawn: the next pass goes on.
    source = LoaderSource(loader(Points(5)), seed=0)
    source.load_state_dict(state)
    with pytest.warns(UserWarning, match="The data have changed"):
        source.next()
    assert (source.state_dict()["pass"], source.state_dict()["drawn"]) == (1, 1)


class Lazy(Points):
    """Makes a generator of its own, from the worker's seed, when it is first drawn from."""

    draws: Any = None

    def __getitem__(self, index: int) -> Tensor:
        self.draws = self.draws or np.random.default_rng(torch.initial_seed())
        return torch.tensor([float(index), self.draws.random()])


def test_a_generator_made_in_a_worker_is_drawn_from_again() -> None:
    resumed = resumed_after(lambda: loader(Lazy(30), num_workers=2), 6)
    straight = LoaderSource(loader(Lazy(30), num_workers=2), seed=0)
    drawn(straight, 6)
    assert drawn(resumed, 4) == drawn(straight, 4)


def test_only_the_rank_that_wrote_a_state_compares_its_batch() -> None:
    source = LoaderSource(loader(Points(20)), seed=0)
    drawn(source, 2)
    other = LoaderSource(loader(Points(30)), seed=0)
    other.load_state_dict({**source.state_dict(), "rank": 1})
    other.next()
