"""Data in fixed blocks: the order of each pass, weights, sweeps, state; a list of batches as blocks."""

from typing import Any

import pytest
import torch

from bilevel.training import Blocks, Cycle


def made(size: int = 7, block_size: int = 2, **options: Any) -> Blocks:
    return Blocks(size, block_size, lambda indices: indices, **{"seed": 0, **options})


def one_pass(source: Blocks) -> list[list[int]]:
    return [source.next().tolist() for _ in range(len(source))]


@pytest.mark.parametrize(
    ("size", "block_size", "wanted"),
    [(7, 2, [[0, 1], [2, 3], [4, 5], [6]]), (6, 3, [[0, 1, 2], [3, 4, 5]]), (3, 3, [[0, 1, 2]]), (2, 1, [[0], [1]])],
)
def test_every_pass_gives_each_block_once(size: int, block_size: int, wanted: list[list[int]]) -> None:
    source = made(size, block_size)
    for _ in range(4):
        assert sorted(one_pass(source)) == wanted
    assert [source.block(k).tolist() for k in range(len(source))] == wanted
    mean = sum(source.weight(k) * float(source.block(k).double().mean()) for k in range(len(source))) / len(source)
    assert mean == pytest.approx((size - 1) / 2)


def test_the_order_is_a_function_of_seed_and_pass_alone() -> None:
    one, same, other = made(40), made(40), made(40, seed=1)
    torch.manual_seed(3)
    passes = [one_pass(one) for _ in range(3)]
    torch.manual_seed(4)
    same.begin_stage(5)
    assert [one_pass(same) for _ in range(3)] == passes
    assert passes[0] != passes[1] != passes[2]
    assert one_pass(other) != passes[0]


def test_it_says_what_it_gave_last() -> None:
    source = made()
    assert source.blocks is source
    assert source.last_block is None
    assert source.last_indices is None
    for _ in range(9):
        batch = source.next()
        block, indices = source.last_block, source.last_indices
        assert block is not None
        assert indices is not None
        assert torch.equal(source.block(block), batch)
        assert torch.equal(indices, batch)


@pytest.mark.parametrize("sweep_size", [1, 2, 3, 5, 100])
def test_a_sweep_goes_through_all_points_with_weights_that_make_their_mean(sweep_size: int) -> None:
    source = made(sweep_size=sweep_size)
    source.next()
    before = source.state_dict()
    parts = list(source.sweep())
    assert torch.cat([batch for batch, _ in parts]).tolist() == list(range(7))
    assert max(len(batch) for batch, _ in parts) == min(max(sweep_size, 2), 7)
    assert sum(weight * float(batch.double().mean()) for batch, weight in parts) / len(parts) == pytest.approx(3.0)
    assert source.state_dict() == before


@pytest.mark.parametrize("drawn", [0, 1, 4, 5, 11])
def test_a_state_is_gone_on_from(drawn: int) -> None:
    source, fresh = made(), made()
    for _ in range(drawn):
        source.next()
    fresh.load_state_dict(source.state_dict())
    assert fresh.last_block == source.last_block
    assert [fresh.next().tolist() for _ in range(9)] == [source.next().tolist() for _ in range(9)]


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"size": 8}, "Blocks: the state has size=7, these size=8"),
        ({"block_size": 3}, "Blocks: the state has block_size=2, these block_size=3"),
        ({"seed": 5}, "Blocks: the state has seed=0, these seed=5"),
    ],
)
def test_the_state_of_other_blocks_is_refused(other: dict[str, Any], match: str) -> None:
    source = made(**other)
    before = source.state_dict()
    with pytest.raises(ValueError, match=match):
        source.load_state_dict(made().state_dict())
    with pytest.raises(ValueError, match="of another kind of data"):
        source.load_state_dict(Cycle([1]).state_dict())
    assert source.state_dict() == before


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"size": 0}, ValueError, "Blocks: size must be a whole number of at least 1, got 0"),
        ({"size": 2.5}, ValueError, "Blocks: size must be a whole number"),
        ({"block_size": 0}, ValueError, "Blocks: block_size must be a whole number of at least 1, got 0"),
        ({"block_size": 8}, ValueError, r"Blocks: block_size=8 is larger than the data \(7 points\); reduce it"),
        ({"seed": -1}, ValueError, "Blocks: seed must be a whole number of at least 0, got -1"),
        ({"sweep_size": 0}, ValueError, "Blocks: sweep_size must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_input_is_refused_by_name(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        made(**options)


def test_a_load_that_cannot_be_called_is_refused() -> None:
    data: Any = torch.arange(7)
    with pytest.raises(TypeError, match="Blocks: load must be a function of the points' indices"):
        Blocks(7, 2, data, seed=0)


def test_a_list_of_batches_is_blocks_that_count_the_same() -> None:
    source = Cycle(["a", "b", "c"])
    assert source.blocks is source
    assert source.last_block is None
    for number in range(7):
        batch = source.next()
        assert source.last_block == number % 3
        assert source.block(number % 3) == batch
    assert list(source.sweep()) == [("a", 1.0), ("b", 1.0), ("c", 1.0)]
    again = Cycle(["a", "b", "c"])
    again.load_state_dict(source.state_dict())
    assert again.last_block == source.last_block


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": 12, "block_size": 3}, r"block_size=3 points .* by 2 ranks, .* make it a multiple of 2$"),
        ({"size": 11, "block_size": 4}, r"size=11 points .* by 2 ranks"),
        ({"size": 12, "block_size": 2, "sweep_size": 5}, r"sweep_size=5 points .* by 2 ranks"),
    ],
)
def test_uneven_shares_over_ranks_are_refused(
    options: dict[str, int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = made(**options)
    alone.begin_stage(1)
    monkeypatch.setattr("bilevel.training.data.blocks.world_size", lambda: 2)
    with pytest.raises(ValueError, match=f"^Blocks: {said}"):
        made(**options)
    # Made before the ranks have met.
    with pytest.raises(ValueError, match=f"^Blocks: {said}"):
        alone.begin_stage(1)
    made(12, 4, sweep_size=6).begin_stage(1)
    # Nothing is swept in parts where one batch holds all.
    made(12, 4, sweep_size=13).begin_stage(1)
