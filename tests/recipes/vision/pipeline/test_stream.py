"""Batches that are begun ahead: what a stack gives, in its order, and nothing begun in vain."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bilevel import BatchStack
from bilevel.training.data.batches import BatchSource
from recipes.vision.pipeline.stream import InOrder, PrefetchedStack, order_of


class Kitchen:
    """Makes batches, and counts how many of each are begun, sent, finished and given up."""

    def __init__(self) -> None:
        self.sent = list[int]()
        self.begun, self.finished, self.given_up = Counter[int](), Counter[int](), Counter[int]()
        self.most = 0

    def begin(self, indices: Tensor, seed: int) -> tuple[list[int], int]:
        self.begun[seed] += 1
        self.most = max(self.most, self.under_way)
        return indices.tolist(), seed

    def finish(self, begun: tuple[list[int], int], seed: int) -> tuple[list[int], int]:
        assert begun[1] == seed
        self.finished[seed] += 1
        return begun

    def send(self, begun: tuple[list[int], int]) -> None:
        assert not self.finished[begun[1]], "sent before it is drawn"
        self.sent.append(begun[1])

    def give_up(self, begun: tuple[list[int], int]) -> None:
        self.given_up[begun[1]] += 1

    @property
    def under_way(self) -> int:
        return self.begun.total() - self.finished.total() - self.given_up.total()


def prefetched(
    kitchen: Kitchen, size: int, batch: int, total: int, drop_last: bool = False, **options: Any
) -> PrefetchedStack[Any]:
    order = order_of(size, batch, seed=7, drop_last=drop_last)
    return PrefetchedStack(order, kitchen.begin, kitchen.finish, kitchen.give_up, total=total, **options)


def plain(size: int, batch: int, drop_last: bool = False) -> BatchStack:
    return BatchStack(size, batch, lambda indices, seed: (indices.tolist(), seed), seed=7, drop_last=drop_last)


def drawn(source: BatchSource, stages: list[int]) -> list[Any]:
    found = []
    for steps in stages:
        source.begin_stage(steps)
        found += [source.next() for _ in range(steps)]
    return found


SHAPES = [
    # size, batch, stage
    (20, 5, 4),
    (20, 5, 3),
    (20, 5, 1),
    (23, 5, 4),
    (23, 5, 5),
    (21, 5, 2),
    # More batches than a shuffle has.
    (20, 5, 7),
    (23, 5, 9),
    (7, 7, 3),
    (9, 7, 3),
    (9, 1, 20),
    (1, 1, 5),
]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
@pytest.mark.parametrize(("size", "batch", "stage"), SHAPES)
def test_nothing_is_begun_that_is_not_drawn(size: int, batch: int, stage: int, ahead: int, drop_last: bool) -> None:
    kitchen, count = Kitchen(), 6
    source = prefetched(kitchen, size, batch, stage * count, drop_last, ahead=ahead)
    found = drawn(source, [stage] * count)
    assert found == drawn(plain(size, batch, drop_last), [stage] * count)
    assert not kitchen.given_up
    assert kitchen.begun == kitchen.finished == Counter(seed for _, seed in found)
    source.close()
    assert not kitchen.given_up
    # That which is drawn counts as under way until it is finished.
    assert kitchen.most == min(ahead + 1, stage * count)


@pytest.mark.parametrize("first", [0, 3])
def test_one_stage_of_the_whole_training(first: int) -> None:
    """As a stage of one level has it, maybe resumed in its middle."""
    kitchen = Kitchen()
    source = prefetched(kitchen, 23, 5, 17, ahead=3)
    if first:
        state = source.state_dict()
        drawn(source, [first])
        state = source.state_dict()
        kitchen = Kitchen()
        source = prefetched(kitchen, 23, 5, 17, ahead=3)
        source.load_state_dict(state)
    found = drawn(source, [17 - first])
    expected = plain(23, 5)
    assert found == drawn(expected, [first, 17 - first])[first:]
    assert not kitchen.given_up
    assert kitchen.begun == kitchen.finished


def test_without_stages_batches_follow_one_another() -> None:
    kitchen = Kitchen()
    source, expected = prefetched(kitchen, 23, 5, 12), plain(23, 5)
    assert [source.next() for _ in range(12)] == [expected.next() for _ in range(12)]
    assert not kitchen.given_up


@pytest.mark.parametrize("place", range(9))
def test_a_state_in_the_middle_of_a_stage_goes_on_as_if_nothing_had_been(place: int) -> None:
    expected = drawn(plain(23, 5), [4] * 5)
    first = prefetched(Kitchen(), 23, 5, 20, ahead=2)
    first.begin_stage(4)
    found = []
    for number in range(place):
        if number and number % 4 == 0:
            first.begin_stage(4)
        found.append(first.next())
    kitchen = Kitchen()
    second = prefetched(kitchen, 23, 5, 20, ahead=4)
    second.load_state_dict(first.state_dict())
    for number in range(place, 20):
        if number % 4 == 0:
            second.begin_stage(4)
        found.append(second.next())
    assert found == expected
    assert not kitchen.given_up
    assert kitchen.begun == kitchen.finished


def test_what_was_under_way_serves_a_state_that_is_loaded() -> None:
    """A trainer that goes back over the stored batches has begun the next ones already."""
    kitchen = Kitchen()
    source = prefetched(kitchen, 40, 4, 10, ahead=3)
    source.begin_stage(10)
    before = source.state_dict()
    first = [source.next() for _ in range(2)]
    source.load_state_dict(before)
    assert [source.next() for _ in range(2)] == first
    drawn_after = [source.next() for _ in range(8)]
    assert drawn_after == drawn(plain(40, 4), [10])[2:]
    twice = {seed for _, seed in first}
    assert {seed for seed, count in kitchen.begun.items() if count > 1} <= twice | set(kitchen.given_up)
    assert kitchen.begun.total() == kitchen.finished.total() + kitchen.given_up.total()


def test_a_state_far_away_gives_up_what_was_under_way() -> None:
    kitchen = Kitchen()
    source = prefetched(kitchen, 40, 4, 100, ahead=3)
    state = source.state_dict()
    for _ in range(25):
        source.next()
    source.load_state_dict(state)
    source.next()
    assert kitchen.given_up.total() == 3
    source.close()
    assert kitchen.under_way == 0
    assert source.next() == drawn(plain(40, 4), [2])[1]


def test_without_room_only_the_next_one_is_begun() -> None:
    kitchen, room = Kitchen(), [True]
    source = prefetched(kitchen, 40, 4, 10, ahead=3, room=lambda indices: room[0])
    source.next()
    assert kitchen.under_way == 3
    room[0] = False
    for _ in range(5):
        source.next()
        # Two levels that wait for one another's room would never go on.
        assert kitchen.under_way >= 1
    assert kitchen.under_way == 1
    room[0] = True
    source.next()
    assert kitchen.under_way == 3
    assert not kitchen.given_up


def test_states_hold_the_place_of_what_is_drawn_next() -> None:
    ahead, none = prefetched(Kitchen(), 23, 5, 20, ahead=5), prefetched(Kitchen(), 23, 5, 20, ahead=0)
    for source in (ahead, none):
        drawn(source, [4, 4])
    assert ahead.state_dict() == none.state_dict()
    assert ahead.state_dict()["cursor"] == plain_state([4, 4])["cursor"]


def plain_state(stages: list[int]) -> dict[str, Any]:
    source = plain(23, 5)
    drawn(source, stages)
    return source.state_dict()


def test_a_state_of_other_data_is_refused() -> None:
    source = prefetched(Kitchen(), 23, 5, 20)
    drawn(source, [3])
    state = source.state_dict()
    for name, value in (("size", 24), ("batch_size", 4), ("seed", 8)):
        with pytest.raises(ValueError, match=name):
            source.check_state({**state, name: value})
    for name in state:
        with pytest.raises(ValueError, match="another kind of data"):
            source.check_state({key: value for key, value in state.items() if key != name})
    with pytest.raises(ValueError, match="another kind of data"):
        source.check_state(plain(23, 5).state_dict())
    assert len(source) == 5


@given(data=st.data())
def test_any_stages_and_any_states_give_what_the_stack_gives(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 30))
    batch = data.draw(st.integers(1, size))
    drop_last = data.draw(st.booleans())
    kitchen = Kitchen()

    def fresh() -> PrefetchedStack[Any]:
        return prefetched(kitchen, size, batch, 10_000, drop_last, ahead=data.draw(st.integers(0, 4)))

    source, expected = fresh(), plain(size, batch, drop_last)
    states = [(source.state_dict(), expected.state_dict())]
    for _ in range(data.draw(st.integers(1, 25))):
        step = data.draw(st.sampled_from(["next", "next", "next", "stage", "save", "load", "anew"]))
        if step == "next":
            assert source.next() == expected.next()
        elif step == "stage":
            steps = data.draw(st.integers(1, 12))
            source.begin_stage(steps)
            expected.begin_stage(steps)
        elif step == "save":
            states.append((source.state_dict(), expected.state_dict()))
        else:
            if step == "anew":
                source.close()
                source = fresh()
            ours, theirs = data.draw(st.sampled_from(states))
            source.load_state_dict(ours)
            expected.load_state_dict(theirs)
    source.close()
    assert kitchen.under_way == 0


@pytest.mark.parametrize("ahead", [0, 2, 9])
@pytest.mark.parametrize(("size", "batch"), [(10, 4), (12, 4), (3, 4), (1, 1), (0, 4)])
def test_a_set_in_order(size: int, batch: int, ahead: int) -> None:
    kitchen = Kitchen()
    source = InOrder(
        size,
        batch,
        lambda indices: kitchen.begin(indices, int(indices[0])),
        lambda begun: kitchen.finish(begun, begun[1])[0],
        kitchen.give_up,
        ahead,
    )
    for _ in range(2):
        batches = list(source)
        assert [i for part in batches for i in part] == list(range(size))
        assert len(batches) == len(source) == -(-size // batch)
        assert not kitchen.given_up
    assert kitchen.under_way == 0


def test_a_set_that_is_left_in_the_middle() -> None:
    kitchen = Kitchen()
    source = InOrder(40, 4, lambda i: kitchen.begin(i, int(i[0])), lambda begun: begun[0], kitchen.give_up)
    batches = iter(source)
    assert next(batches) == [0, 1, 2, 3]
    batches.close()  # type: ignore[attr-defined]
    assert kitchen.given_up.total() == 2


def test_the_order_alone() -> None:
    order, expected = order_of(23, 5, seed=7), plain(23, 5)
    for _ in range(12):
        indices, seed = order.next()
        assert torch.is_tensor(indices)
        assert (indices.tolist(), seed) == expected.next()


def steps_made(source: PrefetchedStack[Any], stages: list[int]) -> list[Any]:
    """As a trainer draws: the next batch is prepared while a step is computed."""
    found = []
    for steps in stages:
        source.begin_stage(steps)
        for _ in range(steps):
            found.append(source.next())
            source.prepare()
    return found


@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize(("size", "batch", "stage"), SHAPES)
def test_a_batch_is_sent_before_it_is_drawn_and_none_in_vain(size: int, batch: int, stage: int, ahead: int) -> None:
    kitchen, count = Kitchen(), 6
    source = prefetched(kitchen, size, batch, stage * count, ahead=ahead, send=kitchen.send)
    found = steps_made(source, [stage] * count)
    assert found == drawn(plain(size, batch), [stage] * count)
    # All but the first, in their order, each once.
    assert kitchen.sent == [seed for _, seed in found[1:]]
    assert not kitchen.given_up
    source.prepare()
    assert len(kitchen.sent) == len(found) - 1


@pytest.mark.parametrize("place", range(12))
def test_what_was_sent_is_neither_lost_nor_drawn_twice_at_a_checkpoint(place: int) -> None:
    kitchen = Kitchen()
    whole = drawn(plain(23, 5), [4, 4, 4])
    source = prefetched(kitchen, 23, 5, 12, send=kitchen.send)
    found = []
    for number in range(place):
        if number % 4 == 0:
            source.begin_stage(4)
        found.append(source.next())
        before = source.state_dict()
        source.prepare()
        assert source.state_dict() == before, "the place is that of who draws"
    other = Kitchen()
    resumed = prefetched(other, 23, 5, 12, send=other.send)
    resumed.load_state_dict(source.state_dict())
    for going_on in (source, resumed):
        rest = []
        for number in range(place, 12):
            if number % 4 == 0:
                going_on.begin_stage(4)
            rest.append(going_on.next())
            going_on.prepare()
        assert found + rest == whole


def test_a_step_that_is_undone_draws_what_was_sent_again() -> None:
    kitchen = Kitchen()
    source = prefetched(kitchen, 20, 5, 8, send=kitchen.send)
    source.begin_stage(4)
    source.next()
    state = source.state_dict()
    second = source.next()
    source.prepare()
    source.load_state_dict(state)
    source.prepare()
    assert source.next() == second
    assert [kitchen.begun[seed] for seed in kitchen.begun if seed == second[1]] == [2], "made again, as it was drawn"
    source.close()
    assert kitchen.under_way == 0


def test_without_a_device_nothing_is_sent() -> None:
    kitchen = Kitchen()
    source = prefetched(kitchen, 23, 5, 12)
    assert steps_made(source, [12]) == drawn(plain(23, 5), [12])
    assert not kitchen.sent
