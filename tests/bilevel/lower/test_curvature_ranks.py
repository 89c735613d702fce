"""Curvature that is lost on one rank is lost on all, with objectives that gather and shares of any size."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel import CG, Implicit, Params, Problem, check_hypergradient, hypergradient
from bilevel.distributed import gather, rank, shard, world_size
from tests.support.rank_processes import WORLDS, on_ranks

POINTS = torch.linspace(-1.0, 1.0, 39, dtype=torch.float64).reshape(13, 3)


class Contrastive(Problem):
    """Each row against the rows of all ranks; `detached` are the ranks on which a factor is a constant."""

    def __init__(self, detached: set[int]) -> None:
        self.detached = detached

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        rows = (batch * lower["y"]).tanh() * upper["x"].exp()
        size = 1.0 + rows.square().mean()
        size = size.detach() if rank() in self.detached else size
        return (rows @ gather(rows).T / size).logsumexp(1).mean() + lower["y"].square().sum()

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return (batch * lower["y"]).square().mean()


def variables() -> tuple[Params, Params]:
    x = {"x": torch.tensor(0.3, dtype=torch.float64)}
    return x, {"y": torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)}


def examined() -> list[int]:
    """Whether the failure of each case names lost curvature."""
    batch = POINTS[shard(len(POINTS))]
    found = []
    for detached in (set[int](), {world_size() - 1}, set(range(world_size()))):
        result = hypergradient(
            *(Contrastive(detached), *variables(), Implicit(CG(9))),
            upper_batch=batch,
            lower_batches=[batch],
            on_failure="ignore",
        )
        found.append(int("lost curvature" in (result.failure or "")))
    report = check_hypergradient(
        *(Contrastive(set()), *variables()),
        upper_batch=batch,
        lower_batches=[batch],
        lower_solver=lambda problem, upper, lower, batches: lower,
        # Over on the first rank alone.
        seconds=1e-9 if rank() == 0 else 1e9,
    )
    return [*found, report.solves]


def test_all_ranks_say_the_same(tmp_path: Path) -> None:
    for world, found in on_ranks(examined, tmp_path).items():
        assert world in WORLDS
        assert found == [[0, 1, 1, 1]] * world
