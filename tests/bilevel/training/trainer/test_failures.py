"""What a trainer refuses, stops at, warns of and counts."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import (
    CG,
    AlternatingSchedule,
    Level,
    Method,
    Params,
    SolverError,
    SolverWarning,
    Status,
    Trainer,
    Unrolled,
)
from bilevel.training import Callback, NonFiniteError
from tests.support.cases import joined
from tests.support.problems.two_heads import LOWER_BATCHES, UPPER_BATCHES, TwoHeads, implicit, make, variables


@pytest.mark.parametrize("index", [0, 1], ids=["misses", "adds"])
def test_an_optimizer_that_misses_or_adds_a_tensor_is_refused(index: int) -> None:
    params = variables()[1]
    tensors = list(params.values())
    wrong = tensors[:1] if index == 0 else [*tensors, torch.ones(1)]
    with pytest.raises(ValueError, match="Level: the optimizer must hold exactly the 2 tensors of params"):
        Level(params, torch.optim.SGD(wrong, lr=0.1), LOWER_BATCHES)


def level(**changes: Any) -> Level:
    params = variables()[1]
    given = {"optimizer": torch.optim.SGD(params.values(), lr=0.1), "data": LOWER_BATCHES, **changes}
    return Level(params, given.pop("optimizer"), given.pop("data"), **given)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"max_grad_norm": 0.0}, "Level: max_grad_norm must be a positive number, got 0.0"),
        ({"max_grad_norm": "1"}, "Level: max_grad_norm must be a positive number, got '1'"),
        ({"micro_batch": 0}, "Level: micro_batch must be a whole number of at least 1, got 0"),
        ({"data": []}, "Level: data is empty"),
    ],
)
def test_a_level_refuses_numbers_out_of_range(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        level(**changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"optimizer": torch.optim.SGD}, "Level: optimizer must be an optimizer of torch.optim, got the class SGD"),
        ({"optimizer": 0.1}, "Level: optimizer must be an optimizer of torch.optim, got 0.1"),
    ],
)
def test_a_level_refuses_other_kinds(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(TypeError, match=match):
        level(**changes)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"on_failure": "quiet"}, "on_failure must be one of"),
        ({"nonfinite_skips": -1}, "nonfinite_skips must be a whole number of at least 0, got -1"),
        ({"schedule": AlternatingSchedule(1, 1, 1, 1, 0.5, {"backbone": "tail"})}, "no lower 'tail'"),
        ({"schedule": AlternatingSchedule(1, 1, 1, 1, 0.5, {"backbone": "head"})}, "differ in shape"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "cg"}, "method must be a Method such as .*, got 'cg'"),
        ({"method": CG}, "method must be a Method such as .*, got the class CG"),
        ({"callbacks": Callback()}, "callbacks must be a list of callbacks, such as .*, got "),
        ({"callbacks": [print]}, r"callbacks\[0\] must be a Callback, got "),
        ({"schedule": (1, 1, 1)}, r"schedule must be an AlternatingSchedule, got \(1, 1, 1\)"),
        ({"problem": TwoHeads}, "problem must be an instance of a Problem, got the class TwoHeads"),
    ],
)
def test_other_kinds_of_arguments_are_refused_by_name(options: dict[str, Any], match: str) -> None:
    with pytest.raises(TypeError, match=match):
        make(**options)


def test_levels_are_levels_and_chunks_are_for_the_lower_one() -> None:
    trainer = make()
    with pytest.raises(TypeError, match=r"upper must be a Level, such as .*, got a dict"):
        Trainer(TwoHeads(), trainer.upper.params, trainer.lower, trainer.schedule)  # type: ignore[arg-type]
    params = variables()[0]
    chunked = Level(params, torch.optim.SGD(params.values(), lr=0.1), UPPER_BATCHES, micro_batch=2)
    with pytest.raises(ValueError, match="upper: micro_batch is for the steps of the lower level"):
        Trainer(TwoHeads(), chunked, trainer.lower, trainer.schedule)


@pytest.mark.parametrize("level", ["lower", "upper"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_no_variable(level: str, bad: float) -> None:
    lower = [LOWER_BATCHES[0], (LOWER_BATCHES[1][0], torch.full((5,), bad, dtype=torch.float64))]
    upper = [UPPER_BATCHES[0], torch.full((3,), bad, dtype=torch.float64)]
    data: dict[str, Any] = {"lower_data": lower} if level == "lower" else {"upper_data": upper}
    trainer = make(schedule=AlternatingSchedule(1, 2, 2), method=implicit(hessian_batches=1), **data)
    seen: list[tuple[Tensor, Tensor]] = []

    class Keep(Callback):
        def on_event(self, trainer: Any, record: dict[str, Any]) -> None:
            seen.append((joined(trainer.upper.params).clone(), joined(trainer.lower.params).clone()))

    trainer.callbacks = (Keep(),)
    reason = "" if level == "lower" else "non-finite: .*"
    with pytest.raises(NonFiniteError, match=f"{level} step 2 .alternation 1.*{reason}no variable was changed"):
        trainer.run()
    assert torch.equal(joined(trainer.upper.params), seen[-1][0])
    assert torch.equal(joined(trainer.lower.params), seen[-1][1])
    assert trainer.steps[level] == 1
    assert all(leaf.grad is None for leaf in (*trainer.upper.params.values(), *trainer.lower.params.values()))


def test_a_gradient_that_is_not_finite_is_caught_too() -> None:
    class Cusp(TwoHeads):
        def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
            return (lower["head"] - lower["head"].detach()).abs().sqrt().sum()

    trainer = make(Cusp())
    before = joined(trainer.lower.params).clone()
    with pytest.raises(NonFiniteError, match=r"lower step 1 .*loss 0\.0, gradient norm nan"):
        trainer.run()
    assert torch.equal(joined(trainer.lower.params), before)


def test_an_optimizers_own_weight_decay_is_warned_of() -> None:
    upper, lower = variables()
    above = Level(upper, torch.optim.SGD(upper.values(), lr=0.1, weight_decay=0.1), UPPER_BATCHES)
    decaying = Level(lower, torch.optim.SGD(lower.values(), lr=0.1, weight_decay=0.01), LOWER_BATCHES)
    with pytest.warns(UserWarning, match="weight decay is not part of the lower objective") as caught:
        Trainer(TwoHeads(), above, decaying, AlternatingSchedule(1, 1, 1))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = Level(lower, torch.optim.SGD(lower.values(), lr=0.1), LOWER_BATCHES)
        Trainer(TwoHeads(), above, plain, AlternatingSchedule(1, 1, 1))


class Concave(TwoHeads):
    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return -3.0 * lower["backbone"].square().sum()


class Detached(TwoHeads):
    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        squares = super().regularizer(upper, lower)
        return squares + 10.0 * squares.detach() * squares


@pytest.mark.parametrize("method", [implicit(CG()), Unrolled()], ids=["implicit", "unrolled"])
def test_failures_that_are_no_solves_are_counted(method: Method) -> None:
    schedule = AlternatingSchedule(5, 4, 1)
    trainer = make(Detached(), method=method, schedule=schedule, on_failure="ignore")
    trainer.run()
    assert trainer.failures == {"FLAGGED": 5}
    resumed = make(Detached(), method=method, schedule=schedule, on_failure="ignore")
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.failures == {"FLAGGED": 5}
    healthy = make(method=method, schedule=schedule)
    healthy.run()
    assert healthy.failures == {}


def test_failures_are_counted_and_warned_of_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make(Concave(), method=implicit(CG()))
        trainer.run()
    assert [w.category for w in caught] == [SolverWarning]
    assert caught[0].filename == __file__
    assert trainer.failures == {Status.NEGATIVE_CURVATURE.name: 15}
    resumed = make(Concave(), method=implicit(CG()))
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.failures == {"NEGATIVE_CURVATURE": 15}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet = make(Concave(), method=implicit(CG()), on_failure="ignore")
        quiet.run()
        assert quiet.failures == {"NEGATIVE_CURVATURE": 15}
        strict = make(Concave(), method=implicit(CG()), on_failure="raise")
        with pytest.raises(SolverError, match="negative curvature"):
            strict.run()
