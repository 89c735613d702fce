"""What comes of NaN, indefinite systems, missed tolerances and bad arguments."""

import inspect
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import (
    CG,
    Identity,
    Implicit,
    Neumann,
    OneStep,
    Params,
    SolverError,
    SolverWarning,
    Status,
    hypergradient,
    linearize,
)
from bilevel.hypergradients import SAMA
from bilevel.hypergradients.updates.update import SGDUpdate
from bilevel.linear import Dense, Solver
from bilevel.products import FiniteDifference, HVPProvider, ReverseOverReverse
from tests.support.cases import joined
from tests.support.problems.closed_forms import NO_BATCH, PROVIDERS, Proximal, proximal_point, relative_error, run


class Broken(Proximal):
    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return super().lower_objective(upper, lower, None) * batch

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return super().upper_objective(upper, lower, None) * batch


@pytest.mark.parametrize("solver", [CG(), CG(layerwise=True), Neumann(), Dense()])
@pytest.mark.parametrize("hvp", [*PROVIDERS, FiniteDifference()], ids=str)
def test_a_nan_in_the_lower_data_is_reported_and_never_turned_into_zero(solver: Solver, hvp: HVPProvider) -> None:
    _, upper, lower = proximal_point()
    with pytest.warns(SolverWarning, match="non-finite.*residual not measured|non-finite.*nan"):
        result = hypergradient(
            Broken(), upper, lower, Implicit(solver, hvp=hvp), upper_batch=1.0, lower_batches=[1.0, math.nan]
        )
    assert result.solution is not None
    assert result.solution.status is Status.NON_FINITE
    assert math.isnan(result.stationarity)
    v = 2.0 * (joined(lower) - 1.0)
    torch.testing.assert_close(joined(result.solution.value), v)
    assert relative_error(joined(result.implicit), v) <= 1e-12


@pytest.mark.parametrize("solver", [CG(), Neumann(), Dense(), Identity()])
def test_a_nan_in_the_upper_data_stays_in_the_gradient(solver: Solver) -> None:
    _, upper, lower = proximal_point()
    with pytest.warns(SolverWarning, match="non-finite"):
        result = hypergradient(Broken(), upper, lower, solver, upper_batch=math.nan, lower_batches=[1.0])
    assert joined(result.grad).isnan().all()
    assert result.loss.isnan()


class Concave(Proximal):
    regularization_weight = 0.1

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return -joined(lower).square().sum()


def test_what_a_failure_does_is_decided_by_on_failure() -> None:
    _, upper, lower = proximal_point()
    with pytest.warns(
        SolverWarning,
        match="negative curvature.*relative residual.*here raise tikhonov from 0 to about [0-9.]+, or raise damping",
    ) as caught:
        warned = run(Concave(), upper, lower)
    assert caught[0].filename == inspect.getfile(run)
    with pytest.raises(SolverError, match="negative curvature") as raised:
        run(Concave(), upper, lower, on_failure="raise")
    assert raised.value.solution is not None
    assert raised.value.solution.status is Status.NEGATIVE_CURVATURE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ignored = run(Concave(), upper, lower, on_failure="ignore")
        run(Concave(), upper, lower, Implicit(CG(20), damping=10.0), on_failure="raise")
        run(Concave(), upper, lower, Implicit(CG(1, rtol=None), damping=10.0), on_failure="raise")
    assert torch.equal(joined(ignored.grad), joined(warned.grad))
    assert ignored.solution is not None
    assert ignored.solution.min_curvature == pytest.approx(1.0 - 2.0 / 0.1)
    with pytest.raises(ValueError, match=r"on_failure must be one of .*'warn'.*got 'quiet'"):
        run(Concave(), upper, lower, on_failure="quiet")  # type: ignore[arg-type]


def test_a_missed_tolerance_is_a_failure_and_a_spent_budget_is_not() -> None:
    problem, upper, lower = proximal_point()
    with pytest.warns(SolverWarning, match="not converged"):
        run(problem, upper, lower, CG(1, rtol=1e-12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = run(problem, upper, lower, CG(1, rtol=None))
    assert result.solution is not None
    assert result.solution.status is Status.BUDGET


def test_bad_arguments() -> None:
    problem, upper, lower = proximal_point()
    bad: Any = [upper["a"]]
    with pytest.raises(TypeError, match="upper must be a dict"):
        run(problem, bad, lower)
    with pytest.raises(ValueError, match="x0 must have the names and shapes of b"):
        linearize(problem, upper, lower, NO_BATCH).hypergradient(None, x0={"a": torch.zeros(2)})

    class Many(Proximal):
        def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
            return lower["a"]

    with pytest.raises(ValueError, match="upper_objective must return a 0-d tensor"):
        run(Many(), upper, lower)


class RootOfX(Proximal):
    """F has a term sqrt(|x|^2), whose gradient at x = 0 is 0/0."""

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return super().upper_objective(upper, lower, batch) + joined(upper).square().sum().sqrt()


class CoupledByRoot(Proximal):
    """The same term couples the levels; the curvature in y is finite."""

    regularization_weight = 0.0

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        y = joined(lower)
        return 0.5 * y.square().sum() - joined(upper).square().sum().sqrt() * y.sum()


@pytest.mark.parametrize(
    ("problem", "part", "other"), [(RootOfX(), "dF/dx", "cross term"), (CoupledByRoot(), "cross term", "dF/dx")]
)
def test_a_nan_outside_the_solve_is_a_failure_that_names_its_part(problem: Proximal, part: str, other: str) -> None:
    _, upper, lower = proximal_point()
    upper = {name: torch.zeros_like(leaf) for name, leaf in upper.items()}
    with pytest.raises(SolverError, match=f"non-finite: the .*{part}.*upper variables") as raised:
        run(problem, upper, lower, on_failure="raise")
    assert other not in str(raised.value)
    assert raised.value.solution is not None
    assert raised.value.solution.status is Status.CONVERGED
    with pytest.warns(SolverWarning, match=part) as caught:
        warned = run(problem, upper, lower)
    assert caught[0].filename == inspect.getfile(run)
    assert joined(warned.grad).isnan().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(problem, upper, lower, on_failure="ignore")
    for method in (OneStep(0.1, hvp=ReverseOverReverse()), SAMA(SGDUpdate(0.1), hvp="auto")):
        with pytest.raises(SolverError, match=part):
            run(problem, upper, lower, method, on_failure="raise")
