"""Stacks without replacement: when they are reshuffled, and that their order is a function of the seed."""

from typing import Any

import pytest
import torch

from bilevel import BatchStack
from bilevel.training.data.batches import Cycle, derive_seed


def stack(size: int, batch_size: int, *, seed: int = 0, drop_last: bool = False) -> BatchStack:
    return BatchStack(size, batch_size, lambda indices, seed: (indices, seed), seed=seed, drop_last=drop_last)


def stage(source: BatchStack, steps: int) -> list[list[int]]:
    source.begin_stage(steps)
    return [source.next()[0].tolist() for _ in range(steps)]


def test_a_full_stack_is_reshuffled_every_fourth_stage() -> None:
    # The paper's numbers: 100,000 points in batches of 1,024, 98 of them with the partial one, 20 a stage.
    source = stack(100_000, 1024)
    assert len(source) == 98
    seen: set[int] = set()
    stages_between: list[int] = []
    count = 0
    for _ in range(17):
        points = [index for batch in stage(source, 20) for index in batch]
        assert len(set(points)) == len(points) == 20 * 1024
        if seen & set(points):
            stages_between.append(count)
            seen, count = set(), 0
        seen |= set(points)
        count += 1
    assert stages_between == [4, 4, 4, 4]


@pytest.mark.parametrize(
    ("size", "batch_size", "steps", "full"), [(1020, 256, 8, 3), (2000, 256, 8, 7), (300, 256, 8, 1)]
)
def test_a_scarce_stack_always_gives_all_steps_in_full_batches(
    size: int, batch_size: int, steps: int, full: int
) -> None:
    source = stack(size, batch_size)
    batches = [batch for _ in range(6) for batch in stage(source, steps)]
    assert len(batches) == 6 * steps
    assert all(len(batch) == batch_size for batch in batches)
    # Reshuffled whenever fewer points than one batch remain, wherever a stage begins or ends: not before, not after.
    for start in range(0, len(batches) - full, full):
        points = [index for batch in batches[start : start + full] for index in batch]
        assert len(set(points)) == full * batch_size
    assert sorted(batches[0]) != sorted(batches[full])


def test_a_stage_that_fits_is_not_reshuffled_and_keeps_the_partial_batch() -> None:
    source = stack(10, 3)
    assert len(source) == 4
    first, second = stage(source, 2), stage(source, 2)
    points = [index for batch in first + second for index in batch]
    assert sorted(points) == list(range(10))
    assert [len(batch) for batch in first + second] == [3, 3, 3, 1]
    assert sorted(index for batch in stage(source, 3) for index in batch) != sorted(points)


def test_fewer_batches_than_the_stage_takes_mean_a_reshuffle_at_its_start() -> None:
    source = stack(10, 3)
    first = [index for batch in stage(source, 2) for index in batch]
    second = [index for batch in stage(source, 3) for index in batch]
    assert len(set(second)) == 9
    assert set(first) & set(second)


def test_the_partial_batch_may_be_dropped() -> None:
    source = stack(10, 3, drop_last=True)
    assert len(source) == 3
    batches = stage(source, 3) + stage(source, 3) + [source.next()[0].tolist() for _ in range(3)]
    assert [len(batch) for batch in batches] == [3] * 9
    for start in (0, 3, 6):
        assert len({index for batch in batches[start : start + 3] for index in batch}) == 9


def test_order_and_random_state_are_functions_of_the_seed() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = stack(50, 7, seed=3)
    first = [one.next() for _ in range(20)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    two = stack(50, 7, seed=3)
    again = [two.next() for _ in range(20)]
    other = stack(50, 7, seed=4)
    assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(first, again, strict=True))
    assert not torch.equal(other.next()[0], first[0][0])
    assert len({seed for _, seed in first}) == 20
    assert first[0][0].dtype == torch.int64


@pytest.mark.parametrize("steps", [3, 20])
def test_a_stack_goes_on_from_its_state(steps: int) -> None:
    source = stack(50, 7)
    stage(source, steps)
    source.next()
    state = source.state_dict()
    assert all(isinstance(value, (int, bool)) for value in state.values())
    rest = [source.next() for _ in range(15)]
    resumed = stack(50, 7)
    resumed.load_state_dict(state)
    again = [resumed.next() for _ in range(15)]
    assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(rest, again, strict=True))


def test_a_state_of_other_data_is_refused() -> None:
    state = stack(50, 7).state_dict()
    for other, match in ((stack(51, 7), "size=50"), (stack(50, 8), "batch_size=7"), (stack(50, 7, seed=1), "seed=0")):
        with pytest.raises(ValueError, match=f"BatchStack: the state has {match}"):
            other.load_state_dict(state)


@pytest.mark.parametrize(
    ("size", "batch_size", "message"),
    [
        (0, 1, "size must be .* got 0"),
        (5, 0, "batch_size must be .* got 0"),
        (5, 6, "batch_size=6 is larger"),
    ],
)
def test_impossible_sizes_are_refused(size: int, batch_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^BatchStack: {message}"):
        stack(size, batch_size)


def test_a_cycle_repeats_its_list_and_resumes() -> None:
    source = Cycle(["a", "b", "c"])
    source.begin_stage(100)
    assert [source.next() for _ in range(5)] == ["a", "b", "c", "a", "b"]
    resumed = Cycle(["a", "b", "c"])
    resumed.load_state_dict(source.state_dict())
    assert resumed.next() == "c"
    with pytest.raises(ValueError, match="Cycle: batches is empty"):
        Cycle([])


def test_derived_seeds_depend_on_every_part() -> None:
    parts: list[tuple[Any, ...]] = [(0,), (1,), (0, "batch"), (0, "batch", 1), (0, "batch", 2), (0, "shuffle", 1)]
    seeds = [derive_seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Fixed once and for all: a stored run must find its order again.
    assert derive_seed(0, "shuffle", 0) == 7559419572821201577
