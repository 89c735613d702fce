"""One solve an alternation for the sum of its upper steps, against the steps written out."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import AlternatingSchedule, Params
from bilevel.training import Callback
from tests.support.cases import joined
from tests.support.problems.two_heads import (
    DAMPING,
    GAMMA,
    LAMBDA,
    LOWER_BATCHES,
    UPPER_BATCHES,
    K,
    TwoHeads,
    implicit,
    make,
)

STEPS = 3
SCHEDULE = AlternatingSchedule(1, K, STEPS)


class Frozen(TwoHeads):
    """The direct part does not depend on the backbone of the upper level."""

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        head = upper["head"]
        return 0.5 * (lower["backbone"] * head.sum() - batch).square().sum() + 0.1 * head.square().sum()


def trainer(problem: TwoHeads, *, aggregate: bool, momentum: float = 0.0, **options: Any) -> Any:
    made = make(problem, implicit(aggregate=aggregate), schedule=SCHEDULE, **options)
    made.levels["upper"].optimizer.param_groups[0]["momentum"] = momentum
    return made


def halving(step: int) -> float:
    return 0.5**step


@pytest.mark.parametrize("decaying", [False, True], ids=["constant rate", "decaying rate"])
def test_without_a_coupled_direct_part_the_summed_update_is_that_of_separate_solves(decaying: bool) -> None:
    ends = []
    for aggregate in (False, True):
        made = trainer(Frozen(), aggregate=aggregate, limit=None)
        if decaying:
            optimizer = made.levels["upper"].optimizer
            made.levels["upper"].scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, halving)
        made.run()
        ends.append(joined(made.upper.params))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-12, atol=1e-13)


def test_the_steps_are_those_written_out() -> None:
    made = trainer(TwoHeads(), aggregate=True, momentum=0.6, limit=None)
    x = joined(made.upper.params).clone()
    made.run()
    y = joined(made.lower.params)[:3]
    hessian = torch.stack([matrix[:3, :3] for matrix, _ in LOWER_BATCHES[:K]]).mean(dim=0)
    system = torch.eye(3, dtype=torch.float64) + hessian / (LAMBDA + DAMPING)
    velocity, rights = torch.zeros(5, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for number, target in enumerate(UPPER_BATCHES[:STEPS], 1):
        scale = x[3:].sum()
        through, own = y * scale - target, x[:3] * scale - target
        rights = rights + through * scale
        head = through @ y + 0.2 * x[3:] + GAMMA * (own @ x[:3] + 0.2 * x[3:])
        backbone = GAMMA * own * scale
        if number == STEPS:
            backbone = backbone + torch.linalg.solve(system, rights)
        velocity = 0.6 * velocity + torch.cat([backbone, head])
        x = x - 0.05 * velocity
    torch.testing.assert_close(joined(made.upper.params), x, rtol=1e-11, atol=1e-12)


class Counting(Callback):
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def on_event(self, trainer: Any, record: dict[str, Any]) -> None:
        if record["event"] == "upper":
            self.records.append(record)


def test_one_solve_an_alternation() -> None:
    heard = Counting()
    made = trainer(TwoHeads(), aggregate=True, callbacks=[heard])
    made.run()
    assert [record["status"] for record in heard.records] == [None, None, "CONVERGED"]
    assert [record["step"] for record in heard.records] == [1, 2, 3]
    assert heard.records[-1]["num_hvps"] > 0
    assert dict(made.solves) == {"CONVERGED": 1}


def test_the_last_norm_limit_is_as_wide_as_the_steps_it_stands_for() -> None:
    free = trainer(Frozen(), aggregate=True, limit=None)
    start = joined(free.upper.params).clone()
    free.run()
    heard = Counting()
    limit = 1e-2
    held = trainer(Frozen(), aggregate=True, limit=limit, callbacks=[heard])
    held.run()
    assert all(record["grad_norm"] > STEPS * limit for record in heard.records)
    moved = float((joined(held.upper.params)[:3] - start[:3]).norm())
    assert 0.0 < moved <= 0.05 * STEPS * limit * (1 + 1e-12)


@pytest.mark.parametrize("rates", [(3.0, 2.0, 1.0), (16.0, 4.0, 1.0)], ids=str)
def test_a_norm_limit_that_binds_no_separate_step_binds_no_aggregated_one(rates: tuple[float, ...]) -> None:
    ends = []
    for aggregate in (False, True):
        heard = Counting()
        made = trainer(Frozen(), aggregate=aggregate, limit=30.0, callbacks=[heard])
        optimizer = made.levels["upper"].optimizer
        made.levels["upper"].scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 1e-3 * rates[min(step, 2)]
        )
        made.run()
        ends.append(joined(made.upper.params))
        if not aggregate:
            assert all(record["grad_norm"] < 30.0 for record in heard.records)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-12, atol=1e-13)


def test_a_last_rate_of_zero_would_lose_the_implicit_part_and_is_refused() -> None:
    made = trainer(Frozen(), aggregate=True)
    optimizer = made.levels["upper"].optimizer
    made.levels["upper"].scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / 2)
    with pytest.raises(ValueError, match="upper scheduler: the learning rate is 0 in upper step 3"):
        made.run()


def test_rates_of_zero_throughout_move_nothing() -> None:
    made = trainer(Frozen(), aggregate=True)
    made.levels["upper"].optimizer.param_groups[0]["lr"] = 0.0
    before = joined(made.upper.params).clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.run()
    assert torch.equal(joined(made.upper.params), before)


def test_a_curvature_that_moves_is_refused() -> None:
    class Dependent(TwoHeads):
        curvature_depends_on_upper = True

    with pytest.raises(ValueError, match="aggregate=True: one solve serves several upper steps only where"):
        trainer(Dependent(), aggregate=True)
