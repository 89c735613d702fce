"""What a trainer refuses, stops at, warns of and counts."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import CG, AlternatingSchedule, Level, Params, SolverError, SolverWarning, Status, Trainer
from bilevel.training import Callback, NonFiniteError
from tests.support.cases import joined
from tests.support.two_heads import LOWER_BATCHES, UPPER_BATCHES, TwoHeads, make, variables


@pytest.mark.parametrize("level", ["lower", "upper"])
def test_an_optimizer_that_misses_or_adds_a_tensor_is_refused(level: str) -> None:
    for index in (0, 1):
        trainer = make()
        tensors = list(getattr(trainer, level).values())
        wrong = tensors[:1] if index == 0 else [*tensors, torch.ones(1)]
        options: dict[str, Any] = {f"{name}_optimizer": trainer.optimizers[name] for name in ("upper", "lower")}
        options[f"{level}_optimizer"] = torch.optim.SGD(wrong, lr=0.1)
        with pytest.raises(ValueError, match=f"{level}_optimizer must hold exactly the 2 tensors of `{level}`"):
            Trainer(
                TwoHeads(),
                trainer.upper,
                trainer.lower,
                lower_data=LOWER_BATCHES,
                upper_data=UPPER_BATCHES,
                schedule=AlternatingSchedule(1, 1, 1),
                **options,
            )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"hessian_batches": 0}, "hessian_batches"),
        ({"hessian_batches": 1.5}, "hessian_batches"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"on_failure": "quiet"}, "on_failure must be one of"),
        ({"adaptation_pairs": None}, "the schedule adapts but adaptation_pairs is empty"),
        ({"adaptation_pairs": {"backbone": "tail"}}, "no lower 'tail'"),
        ({"adaptation_pairs": {"backbone": "head"}}, "'backbone' and 'head' differ in shape"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make(**options)


@pytest.mark.parametrize("level", ["lower", "upper"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_no_variable(level: str, bad: float) -> None:
    lower = [LOWER_BATCHES[0], (LOWER_BATCHES[1][0], torch.full((5,), bad, dtype=torch.float64))]
    upper = [UPPER_BATCHES[0], torch.full((3,), bad, dtype=torch.float64)]
    data: dict[str, Any] = {"lower_data": lower} if level == "lower" else {"upper_data": upper}
    trainer = make(schedule=AlternatingSchedule(1, 2, 2), adaptation_pairs=None, hessian_batches=1, **data)
    seen: list[tuple[Tensor, Tensor]] = []

    class Keep(Callback):
        def on_event(self, trainer: Any, record: dict[str, Any]) -> None:
            seen.append((joined(trainer.upper).clone(), joined(trainer.lower).clone()))

    trainer.callbacks = (Keep(),)
    expected = warnings.catch_warnings() if level == "lower" else pytest.warns(SolverWarning, match="non-finite")
    with pytest.raises(NonFiniteError, match=f"{level} step 2 .alternation 1.*no variable was changed"), expected:
        trainer.run()
    assert torch.equal(joined(trainer.upper), seen[-1][0])
    assert torch.equal(joined(trainer.lower), seen[-1][1])
    assert trainer.steps[level] == 1
    assert all(leaf.grad is None for leaf in (*trainer.upper.values(), *trainer.lower.values()))


def test_a_gradient_that_is_not_finite_is_caught_too() -> None:
    class Cusp(TwoHeads):
        def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
            return (lower["head"] - lower["head"].detach()).abs().sqrt().sum()

    trainer = make(Cusp())
    before = joined(trainer.lower).clone()
    with pytest.raises(NonFiniteError, match=r"lower step 1 .*loss 0\.0, gradient norm nan"):
        trainer.run()
    assert torch.equal(joined(trainer.lower), before)


def test_an_optimizers_own_weight_decay_is_warned_of() -> None:
    upper, lower = variables()
    rest: dict[str, Any] = {
        "upper_optimizer": torch.optim.SGD(upper.values(), lr=0.1, weight_decay=0.1),
        "lower_data": LOWER_BATCHES,
        "upper_data": UPPER_BATCHES,
        "schedule": AlternatingSchedule(1, 1, 1),
    }
    decaying = torch.optim.SGD(lower.values(), lr=0.1, weight_decay=0.01)
    with pytest.warns(UserWarning, match="weight decay is not part of the lower objective") as caught:
        Trainer(TwoHeads(), Level(upper, MISSING, MISSING), Level(lower, decaying, MISSING), MISSING, **rest)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trainer(
            TwoHeads(),
            Level(upper, MISSING, MISSING),
            Level(lower, torch.optim.SGD(lower.values(), lr=0.1), MISSING),
            MISSING,
            **rest,
        )


class Concave(TwoHeads):
    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return -3.0 * lower["backbone"].square().sum()


def test_failures_are_counted_and_warned_of_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make(Concave(), solver=CG())
        trainer.run()
    assert [w.category for w in caught] == [SolverWarning]
    assert trainer.failures == {Status.NEGATIVE_CURVATURE.name: 15}
    resumed = make(Concave(), solver=CG())
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.failures == {"NEGATIVE_CURVATURE": 15}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet = make(Concave(), solver=CG(), on_failure="ignore")
        quiet.run()
        assert quiet.failures == {"NEGATIVE_CURVATURE": 15}
        strict = make(Concave(), solver=CG(), on_failure="raise")
        with pytest.raises(SolverError, match="negative curvature"):
            strict.run()
