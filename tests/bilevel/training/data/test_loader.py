"""A DataLoader as a source: each pass anew, as it goes, a function of (seed, pass, batch)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from bilevel.checkpoint import random_state
from bilevel.training import Cycle, LoaderSource
from tests.bilevel.training.data.data_sets import Points, Shuffled, Stream, drawn, loader, points_of

WEIGHTS = [float(i + 1) for i in range(10)]


@dataclass
class Pair:
    inputs: Tensor
    name: str


def as_dict(items: list[Tensor]) -> dict[str, Any]:
    return {"x": torch.stack(items), "count": len(items), "noise": torch.rand(2)}


def as_pair(items: list[Tensor]) -> Pair:
    return Pair(torch.stack(items), f"{len(items)} points")


class Epochs(Sampler[int]):
    """An order that depends on the epoch which it is told, and on nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.told.append(epoch)

    def __iter__(self) -> Iterator[int]:
        return iter([(i + self.told[-1]) % 10 for i in range(10)])

    def __len__(self) -> int:
        return 10


class Iterated(DataLoader):
    """Iterates in a way of its own."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield {"batch": batch}


# Everything here is drawn again exactly; ways to make a loader, and batches a pass.
KINDS: dict[str, tuple[Callable[[], DataLoader[Any]], int]] = {
    "shuffled": (lambda: loader(), 4),
    "in order": (lambda: loader(shuffle=False), 4),
    "full batches": (lambda: loader(drop_last=True), 3),
    "own generator": (lambda: loader(generator=torch.Generator()), 4),
    "with replacement": (lambda: loader(sampler=RandomSampler(Points(), replacement=True, num_samples=70)), 24),
    "subset": (lambda: loader(sampler=SubsetRandomSampler(range(0, 10, 2))), 2),
    "weighted": (lambda: loader(sampler=WeightedRandomSampler(WEIGHTS, 8)), 3),
    "sampler's generator": (lambda: loader(sampler=SubsetRandomSampler(range(9), torch.Generator())), 3),
    "batch sampler": (lambda: loader(batch_sampler=BatchSampler(RandomSampler(Points()), 4, True)), 2),
    "own sampler": (lambda: loader(sampler=Shuffled()), 4),
    "own batch sampler": (lambda: loader(batch_sampler=[[0, 1], [2, 3, 4], [5]]), 3),
    "distributed": (lambda: loader(sampler=DistributedSampler(Points(), num_replicas=2, rank=1)), 2),
    "epochs": (lambda: loader(sampler=Epochs()), 4),
    "dicts": (lambda: loader(collate_fn=as_dict), 4),
    "dataclasses": (lambda: loader(collate_fn=as_pair), 4),
    "single points": (lambda: loader(batch_size=None), 10),
    "indices at once": (lambda: loader(Subset(Points(), range(3, 9))), 2),
    "stream": (lambda: loader(Stream()), 4),
    "stream of batches": (lambda: loader(Stream(), batch_size=None), 10),
    "endless stream": (lambda: loader(Stream(None)), 10**9),
    "two workers": (lambda: loader(num_workers=2), 4),
    "persistent workers": (lambda: loader(num_workers=2, persistent_workers=True, prefetch_factor=3), 4),
    "workers, own sampler": (lambda: loader(sampler=Shuffled(), num_workers=2), 4),
    "workers, single points": (lambda: loader(batch_size=None, num_workers=2), 10),
    "stream from workers": (lambda: loader(Stream(12), num_workers=2), 4),
    "stream, persistent": (lambda: loader(Stream(12), num_workers=1, persistent_workers=True), 4),
    "iterated its own way": (lambda: Iterated(Points(), batch_size=3, shuffle=True), 4),
    "its own way, workers": (lambda: Iterated(Points(), batch_size=3, shuffle=True, num_workers=2), 4),
}
EVERY = pytest.mark.parametrize(("make", "length"), KINDS.values(), ids=KINDS.keys())


def contents(batches: list[Any]) -> list[str]:
    return [repr(batch) for batch in batches]


def next_of(source: LoaderSource, number: int) -> list[str]:
    return contents(drawn(source, number))


@EVERY
def test_every_kind_resumes_where_it_was_and_leaves_the_training_its_random_state(
    make: Callable[[], DataLoader[Any]], length: int
) -> None:
    torch.manual_seed(1)
    before = repr(random_state())
    whole = LoaderSource(make(), seed=3)
    straight, states = [], []
    for _ in range(11):
        states.append(whole.state_dict())
        straight += next_of(whole, 1)
    assert [(state["pass"], state["drawn"]) for state in states[1:]] == [
        ((i - 1) // length, (i - 1) % length + 1) for i in range(1, 11)
    ]
    for place in (0, 1, 3, 4, 5, 10):
        resumed = LoaderSource(make(), seed=3)
        resumed.load_state_dict(states[place])
        assert next_of(resumed, 11 - place) == straight[place:], place
    assert repr(random_state()) == before


ENDING = {name: kind for name, kind in KINDS.items() if name != "endless stream"}


@pytest.mark.parametrize(("make", "length"), ENDING.values(), ids=ENDING.keys())
def test_passes_differ_in_what_is_drawn_at_random(make: Callable[[], DataLoader[Any]], length: int) -> None:
    source = LoaderSource(make(), seed=3)
    passes = [next_of(source, length) for _ in range(3)]
    assert all(not set(one) & set(other) for one, other in pairwise(passes))


def test_a_pass_shows_every_point_once_and_the_next_in_another_order() -> None:
    source = LoaderSource(loader(), seed=0)
    first, second = points_of(drawn(source, 4)), points_of(drawn(source, 4))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_batches_do_not_depend_on_the_workers() -> None:
    sources = [
        LoaderSource(loader(Points(20), num_workers=workers, **options), seed=4)
        for workers, options in ((0, {}), (1, {}), (2, {}), (2, {"persistent_workers": True}))
    ]
    first, *others = [next_of(source, 17) for source in sources]
    assert all(other == first for other in others)


def test_another_seed_is_another_order() -> None:
    assert next_of(LoaderSource(loader(), seed=1), 4) != next_of(LoaderSource(loader(), seed=2), 4)
    torch.manual_seed(0)
    upper, lower = LoaderSource(loader()), LoaderSource(loader())
    assert upper.seed != lower.seed
    assert next_of(upper, 4) != next_of(lower, 4)
    torch.manual_seed(0)
    assert LoaderSource(loader()).seed == upper.seed
    one, other = (LoaderSource(loader(generator=torch.Generator().manual_seed(5))) for _ in range(2))
    assert one.seed == other.seed != LoaderSource(loader(generator=torch.Generator().manual_seed(6))).seed


def test_loaders_that_share_a_generator_do_not_disturb_each_other() -> None:
    shared = torch.Generator().manual_seed(2)

    def replaced() -> DataLoader[Any]:
        return loader(sampler=RandomSampler(Points(), replacement=True, num_samples=70, generator=shared))

    alone = next_of(LoaderSource(replaced(), seed=1), 20)
    state = shared.get_state()
    one, other = LoaderSource(replaced(), seed=1), LoaderSource(replaced(), seed=8)
    together = []
    for _ in range(20):
        together += next_of(one, 1)
        other.next()
    assert together == alone
    assert torch.equal(shared.get_state(), state)


def test_one_persistent_loader_serves_two_sources() -> None:
    shared = loader(Stream(12), num_workers=1, persistent_workers=True)
    one, other, alone = LoaderSource(shared, seed=1), LoaderSource(shared, seed=2), LoaderSource(shared, seed=1)
    together = []
    for _ in range(6):
        together += next_of(one, 1)
        other.next()
    assert together == next_of(alone, 6)


def test_the_set_is_drawn_as_it_goes() -> None:
    points = Points(1000)
    source = LoaderSource(loader(points), seed=0)
    assert points.loaded == 0
    drawn(source, 2)
    assert points.loaded == 6
    stream = LoaderSource(loader(Stream(None)), seed=0)
    assert points_of(drawn(stream, 2)) == list(range(6))


def test_resuming_in_the_middle_loads_one_batch_again_where_there_are_indices() -> None:
    source = LoaderSource(loader(Points(3000)), seed=0)
    drawn(source, 500)
    points = Points(3000)
    resumed = LoaderSource(loader(points), seed=0)
    resumed.load_state_dict(source.state_dict())
    assert next_of(resumed, 2) == next_of(source, 2)
    assert points.loaded == 9


def test_a_step_back_costs_nothing() -> None:
    points, stream = Points(), Stream()
    for dataset, loaded in ((points, lambda: points.loaded), (stream, lambda: stream.begun)):
        source = LoaderSource(loader(dataset), seed=0)
        for _ in range(9):
            before = source.state_dict()
            batch = next_of(source, 1)
            cost = loaded()
            source.load_state_dict(before)
            assert source.state_dict() == before
            assert next_of(source, 1) == batch
            assert loaded() == cost
        straight = LoaderSource(loader(dataset), seed=0)
        drawn(straight, 9)
        assert next_of(source, 3) == next_of(straight, 3)


def test_a_source_goes_back_to_any_place_and_forth() -> None:
    source = LoaderSource(loader(), seed=0)
    states, straight = [], []
    for _ in range(10):
        states.append(source.state_dict())
        straight += next_of(source, 1)
    for place in (7, 2, 0, 9, 4, 5, 8):
        source.load_state_dict(states[place])
        assert next_of(source, 1) == straight[place : place + 1], place


def test_a_state_is_small_and_plain() -> None:
    source = LoaderSource(loader(), seed=7)
    source.begin_stage(5)
    assert source.state_dict() == {"seed": 7, "pass": 0, "drawn": 0, "fingerprint": None, "rank": 0}
    drawn(source, 5)
    state = source.state_dict()
    assert (state["pass"], state["drawn"]) == (1, 1)
    assert all(isinstance(value, (int, str)) for value in state.values())


def test_a_state_brings_its_seed_unless_another_was_asked_for() -> None:
    source = LoaderSource(loader())
    drawn(source, 3)
    state = source.state_dict()
    resumed = LoaderSource(loader())
    resumed.load_state_dict(state)
    assert next_of(resumed, 3) == next_of(source, 3)
    with pytest.raises(ValueError, match=rf"^LoaderSource: the state has seed={source.seed}, this source seed=5"):
        LoaderSource(loader(), seed=5).load_state_dict(state)
    with pytest.raises(ValueError, match=r"the state, of \['batches', 'position'\], is of another kind of data"):
        resumed.load_state_dict(Cycle([1]).state_dict())


def test_samplers_and_datasets_are_told_the_pass() -> None:
    inner, outer = Epochs(), Epochs()
    drawn(LoaderSource(loader(batch_sampler=BatchSampler(inner, 5, False)), seed=0), 5)
    assert inner.told == [0, 1, 2]

    class Told(Points):
        def set_epoch(self, epoch: int) -> None:
            outer.told.append(epoch)

    drawn(LoaderSource(loader(Told()), seed=0), 5)
    assert outer.told == [0, 1]
    source = LoaderSource(loader(shuffle=None, sampler=DistributedSampler(Points(), 2, 0)), seed=0)
    first, second = points_of(drawn(source, 2)), points_of(drawn(source, 2))
    by_hand = DistributedSampler(Points(), 2, 0)
    by_hand.set_epoch(1)
    assert (second, first) == (list(by_hand), first)
    assert first != second


class Growing(IterableDataset[Tensor]):
    """One point in the first pass, two in the second, and so on."""

    passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        return iter(torch.arange(float(self.passes)))


def test_a_pass_may_have_another_length_each_time() -> None:
    source = LoaderSource(DataLoader(Growing(), batch_size=None), seed=0)
    assert drawn(source, 6) == [0.0, 0.0, 1.0, 0.0, 1.0, 2.0]
    assert (source.state_dict()["pass"], source.state_dict()["drawn"]) == (2, 3)


class Once(IterableDataset[int]):
    def __init__(self, items: list[int]) -> None:
        self.items = iter(items)

    def __iter__(self) -> Iterator[int]:
        return self.items


def test_a_pass_without_a_batch_is_an_error() -> None:
    source = LoaderSource(DataLoader(Once([1, 2]), batch_size=1), seed=0)
    drawn(source, 2)
    with pytest.raises(ValueError, match=r"pass 1 \(from 0\) of the DataLoader has no batch. An IterableDataset must"):
        source.next()
    for empty in (loader(Once([]), num_workers=1), loader(Once([]), batch_size=None)):
        with pytest.raises(ValueError, match=r"^LoaderSource: pass 0 \(from 0\) of the DataLoader has no batch"):
            LoaderSource(empty, seed=0).next()
    with pytest.raises(ValueError, match=r"pass 0 .* or smaller than a batch with drop_last=True$"):
        LoaderSource(loader(batch_size=11, drop_last=True), seed=0).next()
