"""One virtual step against hand-written formulas, and against an unrolled step."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import Hypergradient, OneStep, Params, Problem, SGDUpdate, SolverError, SolverWarning, Status, Unrolled
from bilevel.products import FiniteDifference, HVPProvider, ReverseOverReverse
from tests.support.by_hand import (
    BATCH,
    BATCHES,
    EXACT,
    RATE,
    UPPER_BATCH,
    Smooth,
    by_hand,
    gradients,
    leaves,
    relative_error,
    run,
    smooth,
)
from tests.support.cases import joined, vector


def darts(problem: Problem, upper: Params, lower: Params, **options: Any) -> Hypergradient:
    """By one step at `RATE`; `options` are the method's."""
    return run(problem, upper, lower, OneStep(RATE, **options))


def virtual_step(problem: Smooth, upper: Params, lower: Params, batches: list[Tensor]) -> Params:
    y = leaves(lower)
    g = gradients(problem.total(upper, y, batches), y)
    return {name: leaf.detach() - RATE * slope for (name, leaf), slope in zip(y.items(), g, strict=True)}


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("hvp", [*EXACT, FiniteDifference(), FiniteDifference(central=False)], ids=str)
def test_darts_by_hand(hvp: HVPProvider, weight: float) -> None:
    problem, upper, lower = smooth(weight)
    at = virtual_step(problem, upper, lower, BATCHES)
    expected = by_hand(problem, upper, lower, at, RATE, BATCHES)
    result = darts(problem, upper, lower, hvp=hvp)
    tolerance = 1e-13 if hvp in EXACT else 1e-5 if hvp == FiniteDifference(central=False) else 1e-8
    assert relative_error(result, expected) <= tolerance
    assert float(result.loss) == pytest.approx(float(problem.upper_objective(upper, at, UPPER_BATCH)), rel=1e-13)
    y = leaves(lower)
    slope = torch.cat(gradients(problem.total(upper, y, BATCHES), y))
    assert result.stationarity == pytest.approx(float(slope.norm()), rel=1e-12)
    assert result.solution is not None
    assert (result.solution.status, result.solution.num_hvps) == (Status.BUDGET, 0)
    assert math.isnan(result.solution.residual_norms[1])


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("hvp", EXACT, ids=str)
def test_darts_with_an_exact_provider_is_one_unrolled_step(hvp: HVPProvider, weight: float) -> None:
    problem, upper, lower = smooth(weight)
    result = run(problem, upper, lower, OneStep(RATE, hvp=hvp), lower_batches=[BATCH])
    unrolled = run(problem, upper, lower, Unrolled(SGDUpdate(RATE)), lower_batches=[BATCH])
    assert relative_error(result, list(unrolled.grad.values())) <= 1e-13


def test_darts_own_differences() -> None:
    """The formula of the paper: gradients in x at y +- e v with e = 0.01 / |v|."""
    problem, upper, lower = smooth(0.0)
    at = virtual_step(problem, upper, lower, [BATCH])
    x, z = leaves(upper), leaves(at)
    value = problem.upper_objective(x, z, UPPER_BATCH)
    direct, v = gradients(value, x, retain_graph=True), gradients(value, z)
    epsilon = 0.01 / float(torch.cat(v).norm())
    ends = []
    for sign in (1.0, -1.0):
        x = leaves(upper)
        y = {name: leaf + sign * epsilon * part for (name, leaf), part in zip(lower.items(), v, strict=True)}
        ends.append(gradients(problem.lower_objective(x, y, BATCH), x))
    expected = [d - RATE * (p - m) / (2 * epsilon) for d, p, m in zip(direct, *ends, strict=True)]
    result = run(problem, upper, lower, OneStep(RATE, hvp=FiniteDifference(step=0.01)), lower_batches=[BATCH])
    assert relative_error(result, expected) <= 1e-12


def test_only_implicit_variables_make_the_virtual_step() -> None:
    problem, upper, lower = smooth()
    at = {"w": virtual_step(problem, upper, lower, BATCHES)["w"], "v": lower["v"]}
    multiplier = {"w": torch.tensor(RATE, dtype=torch.float64), "v": torch.tensor(0.0)}
    expected = by_hand(problem, upper, lower, at, multiplier, BATCHES)
    result = darts(problem, upper, lower, hvp=ReverseOverReverse(), implicit=["w"])
    assert relative_error(result, expected) <= 1e-13


@pytest.mark.parametrize("options", [{}, {"hvp": ReverseOverReverse()}], ids=["default", "exact"])
def test_variables_that_nothing_uses_get_zeros(options: dict[str, Any]) -> None:
    problem, upper, lower = smooth()
    result = darts(problem, {**upper, "idle": vector(2)}, {**lower, "spare": vector(3)}, **options)
    assert not result.grad["idle"].any()
    assert all(leaf.isfinite().all() for leaf in result.grad.values())
    assert result.solution is not None
    assert not result.solution.value["spare"].any()


def test_nothing_is_written() -> None:
    problem, upper, lower = smooth()
    x, y = leaves(upper), leaves(lower)
    held = {name: leaf.detach().clone() for name, leaf in y.items()}
    darts(problem, x, y)
    for name, leaf in y.items():
        assert leaf.grad is None
        assert leaf._version == 0
        assert torch.equal(leaf, held[name])


@pytest.mark.parametrize("broken", [{"lower_batches": [BATCH * math.nan]}, {"upper_batch": BATCH * math.nan}], ids=str)
def test_what_is_not_finite_is_reported_and_kept(broken: dict[str, Any]) -> None:
    case = (*smooth(), OneStep(RATE))
    with pytest.warns(SolverWarning, match="non-finite"):
        result = run(*case, **broken)
    assert joined(result.grad).isnan().any()
    assert result.failure is not None
    assert result.failure.startswith("non-finite")
    with pytest.raises(SolverError, match="non-finite"):
        run(*case, **broken, on_failure="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(*case, **broken, on_failure="ignore")


@pytest.mark.parametrize("step_size", [0.0, -0.1, math.nan, math.inf, "0.1", True])
def test_a_bad_step_size(step_size: Any) -> None:
    with pytest.raises(ValueError, match="OneStep: step_size must be a positive number"):
        OneStep(step_size)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="lower_batches is empty"):
        run(*smooth(), OneStep(RATE), lower_batches=[])
    with pytest.raises(ValueError, match="on_failure must be one of"):
        run(*smooth(), OneStep(RATE), on_failure="shout")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="OneStep: step_size is missing; there is no lower optimizer here"):
        run(*smooth(), OneStep())
    with pytest.raises(ValueError, match="OneStep: lower_batches must be a whole number of at least 1, got 0"):
        OneStep(RATE, lower_batches=0)
    with pytest.raises(TypeError, match="hvp must be"):
        OneStep(RATE, hvp="exact")  # type: ignore[arg-type]
    assert OneStep(RATE, lower_batches=3).stored_batches == 3
