"""Outputs that several processes computed in shares are those of one; of many types, some of fewer rows than ranks."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel.distributed import world_size
from bilevel.tree import tensors_in
from recipes.vision.shards import Rows, evaluated_rows, on_shards
from tests.support.rank_processes import on_ranks

COUNTS = (1, 2, 3, 4, 5, 9)
COMPUTED = {
    2: [[1, 1, 2, 2, 3, 5], [1, 1, 1, 2, 2, 4]],
    4: [[1, 2, 3, 1, 2, 3], *3 * [[1, 2, 3, 1, 1, 2]]],
}
"""By the number of ranks: how many rows each of them passed through the network for each of `COUNTS`."""


def network(calls: list[int], inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Rows that depend on their own sample alone, of several types."""
    x = inputs["x"]
    calls.append(len(x))
    return {
        "scores": x.sin() * inputs["y"][:, None],
        "half": [x.bfloat16(), x.double()],
        "kinds": (x > 0.2, (9 * x).long(), (9 * x).to(torch.int32), (9 * x).to(torch.uint8)),
    }


def inputs_of(count: int) -> dict[str, Tensor]:
    return {"x": torch.linspace(-1, 1, 3 * count).abs().view(count, 3), "y": torch.arange(count) / 3}


def own_rows(count: int) -> Rows:
    rows = evaluated_rows(count)
    return Rows({name: tensor[rows] for name, tensor in inputs_of(count).items()}, count)


def found_here() -> dict[str, Any]:
    calls: list[int] = []
    with torch.no_grad():
        outputs = [on_shards(partial(network, calls), own_rows(count)) for count in COUNTS]
    return {"world": world_size(), "calls": calls, "outputs": outputs}


def test_outputs_of_several_ranks_are_those_of_one(tmp_path: Path) -> None:
    for world, ranks in on_ranks(found_here, tmp_path).items():
        assert [rank["calls"] for rank in ranks] == COMPUTED[world]
        for rank in ranks:
            assert rank["world"] == world
            for count, found in zip(COUNTS, rank["outputs"], strict=True):
                expected = network([], inputs_of(count))
                assert found.keys() == expected.keys()
                for mine, alone in zip(tensors_in(found), tensors_in(expected), strict=True):
                    assert mine.dtype == alone.dtype
                    assert torch.equal(mine, alone)
