"""Which optimizers a level takes, and which it refuses when it is made."""

import warnings
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import StepLR

from bilevel import AlternatingSchedule, Level, OneStep, Params, Trainer
from tests.bilevel.training.levels.making import level
from tests.support.problems.closed_forms import quadratic


class NeedsBoth(Optimizer):
    def step(self, closure: Any, extra: int) -> Any:  # type: ignore[override]
        return closure() + extra


def twice(params: Params) -> Optimizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SGD([*params.values(), params["w"]], 0.1)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda p: torch.optim.LBFGS(p.values()), "LBFGS.step needs 'closure'.*torch.optim.SGD.*call hypergradient"),
        (lambda p: NeedsBoth(p.values(), {}), "NeedsBoth.step needs 'closure'"),
        (lambda p: torch.optim.SparseAdam(list(p.values())), "SparseAdam takes sparse gradients alone; .*optim.Adam"),
        (lambda p: SGD(p.values(), 0.1, maximize=True), "maximize=True climbs.*return the negative"),
        (lambda p: SGD([{"params": [p["w"]], "maximize": True}, {"params": [p["b"]]}], 0.1), "maximize=True"),
        (lambda p: Adam(p.values(), differentiable=True), "differentiable=True records steps.*leave it out"),
        (lambda p: Adam(p.values(), capturable=True), "capturable=True is for variables on a GPU.*leave it out"),
        (twice, "holds 3 entries for 2 tensors.*more than once; build it from list"),
        (lambda p: SGD([p["w"]], 0.1), r"must hold exactly the 2 tensors of params; it holds 1 and misses \['b'\]"),
        (lambda p: SGD([*p.values(), torch.zeros(1)], 0.1), "must hold exactly the 2 tensors of params; it holds 3"),
    ],
)
@pytest.mark.parametrize("scheduled", [False, True])
def test_optimizers_that_do_not_fit_are_refused_with_the_remedy(make: Any, match: str, scheduled: bool) -> None:
    def schedule(optimizer: Optimizer) -> Any:
        # A schedule wraps the step of its optimizer.
        return StepLR(optimizer, 2) if scheduled and "lr" in optimizer.param_groups[0] else None

    with pytest.raises(ValueError, match=f"^Level: (optimizer: )?.*{match}"):
        level(make, schedule)


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}])
def test_flags_of_execution_change_nothing(flags: dict[str, Any]) -> None:
    made = level(lambda p: Adam([{"params": [p["w"]], "lr": 0.5}, {"params": [p["b"]]}], 0.1, **flags))
    made.descend({"w": torch.tensor([3.0, -4.0]), "b": torch.tensor([12.0])}, 13.0)
    # Adam's first step is of the length of its rate, each group's own.
    torch.testing.assert_close(made.params["w"].detach(), torch.tensor([-0.5, 0.5]))
    torch.testing.assert_close(made.params["b"].detach(), torch.tensor([-0.1]))


def test_one_step_of_several_rates_is_refused() -> None:
    def trainer(method: OneStep) -> Trainer:
        problem, upper, lower = quadratic()
        groups = [{"params": [leaf], "lr": 0.01 * (k + 1)} for k, leaf in enumerate(lower.values())]
        levels = Level(upper, SGD(upper.values(), 0.1), [None]), Level(lower, SGD(groups, 0.1), [None])
        return Trainer(problem, *levels, AlternatingSchedule(2, 3, 1), method)

    match = r"OneStep: step_size=None .* groups have several, \[0.01, 0.02.*pass step_size"
    with pytest.raises(ValueError, match=match):
        trainer(OneStep())
    trainer(OneStep(0.05)).run()
