"""Training steps under autocast: what replays them knows in which precision they were made."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import AlternatingSchedule, Checkpointing, Level, Params, Problem, Trainer, Unrolled, functional_call
from bilevel.nn import in_curvature_pass, training_autocast
from tests.support.cases import vector

BATCHES = [vector(40, seed).reshape(10, 4).float() for seed in (1, 2, 3)]


class Mixed(Problem):
    """A network whose lower passes are cast as `spelling` says, in training steps alone."""

    def __init__(self, spelling: str) -> None:
        torch.manual_seed(3)
        self.spelling = spelling
        self.net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 1))

    def cast(self) -> AbstractContextManager[Any]:
        if self.spelling == "training_autocast":
            return training_autocast("cpu")
        if self.spelling == "by in_curvature_pass":
            return torch.autocast("cpu", dtype=torch.bfloat16, enabled=not in_curvature_pass())
        return nullcontext()

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        with self.cast():
            outputs = functional_call(self.net, lower, batch).float().squeeze(1)
        ridge = torch.stack([leaf.square().sum() for leaf in lower.values()]).sum()
        return (outputs - batch.sum(1)).square().mean() + upper["log"].exp() * ridge

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return functional_call(self.net, lower, batch).square().mean()


def training(spelling: str, method: Unrolled, optimizer: type[Any], **options: Any) -> Trainer:
    problem = Mixed(spelling)
    upper = {"log": torch.tensor(-2.0)}
    lower = {name: p.detach().clone() for name, p in problem.net.named_parameters()}
    return Trainer(
        problem,
        Level(upper, torch.optim.SGD(upper.values(), lr=0.1), BATCHES),
        Level(lower, optimizer(lower.values(), lr=0.05), BATCHES, max_grad_norm=1.0),
        AlternatingSchedule(3, 4, 1),
        method,
        on_failure="raise",
        **options,
    )


def around(spelling: str) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16) if spelling == "around the run" else nullcontext()


SPELLINGS = ["training_autocast", "around the run", "by in_curvature_pass"]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("method", [Unrolled(), Unrolled(recompute=True), Unrolled(steps=2)])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_steps_in_bfloat16_are_replayed_without_a_failure(
    spelling: str, method: Unrolled, optimizer: type[Any]
) -> None:
    trainer = training(spelling, method, optimizer)
    with around(spelling):
        trainer.run()
    plain = training("none", method, optimizer)
    plain.run()
    assert any(not torch.equal(leaf, plain.lower.params[name]) for name, leaf in trainer.lower.params.items())
    assert trainer.problem.net[1].num_batches_tracked == 12, "replays write no buffer"  # type: ignore[attr-defined]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_hook_that_moves_the_variables_is_told_under_autocast_too(spelling: str) -> None:
    trainer = training(spelling, Unrolled(), torch.optim.SGD)

    def move(upper: Params, lower: Params, step: int) -> None:
        with torch.no_grad():
            for leaf in lower.values():
                leaf.mul_(0.99)

    trainer.problem.after_lower_step = move  # type: ignore[method-assign]
    with around(spelling), pytest.raises(RuntimeError, match="not replayed: a lower step that moved the variables"):
        trainer.run()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_recorded_steps_keep_their_precision_in_a_checkpoint(spelling: str, tmp_path: Path) -> None:
    whole = training(spelling, Unrolled(), torch.optim.SGD)
    first = training(spelling, Unrolled(), torch.optim.SGD)
    resumed = training(spelling, Unrolled(), torch.optim.SGD, callbacks=[Checkpointing(tmp_path)])
    with around(spelling):
        torch.manual_seed(0)
        whole.run()
        torch.manual_seed(0)
        first._now = first._begin()
        first._lower_stage(first._now)
    torch.save(first.state_dict(), tmp_path / "state")
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    with around(spelling):
        resumed.run()
    for name, leaf in whole.lower.params.items():
        assert torch.equal(leaf, resumed.lower.params[name]), name
