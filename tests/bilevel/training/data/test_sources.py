"""What can stand for a level's batches, and what is refused with the remedy."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset

from bilevel import AlternatingSchedule, BatchStack, Params, Trainer
from bilevel.training import Cycle, Level, LoaderSource, SingleLevelTrainer, Training
from tests.bilevel.training.data.data_sets import Points, Stream, loader
from tests.support.problems.closed_forms import quadratic


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


def stack(size: int = 4, seed: int = 1) -> BatchStack:
    return BatchStack(size, 2, lambda indices, _: indices.double(), seed=seed)


SOURCES: dict[str, Callable[[], Any]] = {
    "loader": lambda: DataLoader(TensorDataset(torch.arange(4.0)), batch_size=2),
    "list": lambda: [torch.zeros(2)] * 3,
    "longer list": lambda: [torch.zeros(2)] * 4,
    "one batch": lambda: [torch.zeros(2)],
    "stack": stack,
    "stack of another seed": lambda: stack(seed=2),
    "stack of more": lambda: stack(size=6),
    "seeded": lambda: LoaderSource(SOURCES["loader"](), seed=3),
    "seeded otherwise": lambda: LoaderSource(SOURCES["loader"](), seed=4),
}

OTHERS = {
    ("loader", "list"): r"Cycle: the state, of \['drawn', .*another kind of data.*resume with the data that",
    ("list", "loader"): r"LoaderSource: the state, of \['batches', 'position'\], is of another kind of data",
    ("stack", "list"): "Cycle: the state, of .*another kind of data",
    ("list", "stack"): "BatchStack: the state, of .*another kind of data",
    ("loader", "stack"): "BatchStack: the state, of .*another kind of data",
    ("list", "longer list"): "Cycle: the state is of a list of 3 batches, this one has 4; resume with the same",
    ("longer list", "list"): "Cycle: the state is of a list of 4 batches, this one has 3",
    ("list", "one batch"): "Cycle: the state is of a list of 3 batches, this one has 1",
    ("stack", "stack of another seed"): "BatchStack: the state has seed=1, this stack seed=2",
    ("stack", "stack of more"): "BatchStack: the state has size=4, this stack size=6",
    ("seeded", "seeded otherwise"): "LoaderSource: the state has seed=3, this source seed=4",
}


def single(data: Any, steps: int) -> SingleLevelTrainer:
    def derivatives(batch: Any) -> tuple[torch.Tensor, Params]:
        return torch.zeros(()), {"w": torch.ones(2)}

    return SingleLevelTrainer(derivatives, level(data), steps)


def bilevel(data: Any, steps: int) -> Trainer:
    problem, x, y = quadratic()
    upper, lower = (Level(v, torch.optim.SGD(v.values(), 0.01), d) for v, d in ((x, [None]), (y, data)))
    return Trainer(problem, upper, lower, AlternatingSchedule(steps, 1, 0))


@pytest.mark.parametrize("make", [single, bilevel])
@pytest.mark.parametrize("pair", OTHERS, ids=" into ".join)
def test_a_state_of_other_data_is_refused_before_anything_is_changed(
    pair: tuple[str, str], make: Callable[[Any, int], Training]
) -> None:
    first = make(SOURCES[pair[0]](), 2)
    first.run()
    state = first.state_dict()
    other = make(SOURCES[pair[1]](), 4)
    name = list(other.levels)[-1]
    before = {key: leaf.clone() for key, leaf in other.levels[name].params.items()}
    where = other.levels[name].data.state_dict()
    with pytest.raises(ValueError, match=f"^{name}: {OTHERS[pair]}"):
        other.load_state_dict(state)
    assert other.progress == 0
    assert other.levels[name].data.state_dict() == where
    assert all(torch.equal(leaf, before[key]) for key, leaf in other.levels[name].params.items())
    with pytest.raises(ValueError, match=f"^{OTHERS[pair]}"):
        other.levels[name].data.load_state_dict(state["data"][name])
    for kind in pair:
        made = make(SOURCES[kind](), 2)
        made.run()
        again = make(SOURCES[kind](), 4)
        again.load_state_dict(made.state_dict())
        again.run()
        assert again.progress == 4
