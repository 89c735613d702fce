"""A lower solution on several ranks, below a module that is wrapped in DistributedDataParallel."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bilevel import CG, Params, Problem
from bilevel.distributed import rank, shard, world_size
from bilevel.hypergradients import lower_solution
from tests.support.cases import vector
from tests.support.rank_processes import on_ranks

ROWS, GOALS = vector(8 * 3, 60).reshape(8, 3), vector(8, 61)
INPUT = vector(2, 62)


class Ridge(Problem):
    """The mean over all rows is that over the ranks, whose shards are of one size."""

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        rows, goals = batch
        return 0.5 * (rows @ lower["y"] - goals).square().mean() + 0.5 * (upper["x"].exp() * lower["y"] ** 2).sum()


def solution_of_all(x: Tensor) -> Tensor:
    return torch.linalg.solve(ROWS.T @ ROWS / 8 + torch.diag(x.exp()), ROWS.T @ GOALS / 8)


def gradients() -> dict[str, Any]:
    """Of a module that computes x, which stands in the loss beside y too, after the mean over the ranks; twice."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        module: nn.Module = nn.Linear(2, 3).double()
    parameters = dict(module.named_parameters())
    if world_size() > 1:
        module = DistributedDataParallel(module)
    own = shard(8)
    rows, goals = ROWS[own], GOALS[own]
    found: dict[str, Any] = {}
    for step in range(2):
        module.zero_grad()
        x = module(INPUT * (1.0 + step))
        x.retain_grad()
        y = lower_solution(Ridge(), {"x": x}, {"y": solution_of_all(x)}, [(rows, goals)], CG(20, rtol=1e-12))
        loss = (rows.sin() @ y["y"] - goals).square().mean() + (rows @ x).cos().mean()
        loss.backward()
        found[f"statuses {step}"] = [made.solution.status.name for made in y.record]
        found |= {f"{name} {step}": p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        through_y = lower_solution(Ridge(), {"x": x}, {"y": solution_of_all(x)}, [(rows, goals)], CG(20, rtol=1e-12))
        (found[f"x {step}"],) = torch.autograd.grad((rows.sin() @ through_y["y"]).square().mean(), x)
    # One rank's overflow is everybody's.
    y = lower_solution(Ridge(), {"x": x}, {"y": solution_of_all(x)}, [(rows, goals)], on_failure="raise")
    (found["overflow"],) = torch.autograd.grad((y["y"] * (float("inf") if rank() == 0 else 1.0)).sum(), x)
    return found


def test_ranks_give_the_gradients_of_one_process(tmp_path: Path) -> None:
    reference = gradients()
    for ranks in on_ranks(gradients, tmp_path).values():
        for found in ranks:
            assert found.pop("overflow").isnan().all()
            for name, value in found.items():
                if isinstance(value, Tensor):
                    assert torch.equal(value, ranks[0][name])
                    torch.testing.assert_close(value, reference[name], rtol=1e-10, atol=1e-12)
                else:
                    assert value == reference[name]
    assert reference["overflow"].isnan().all()
