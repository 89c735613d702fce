"""`check_hypergradient` says of every method what its closed form says: right, or wrong by how much."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from bilevel import (
    CG,
    MINRES,
    Identity,
    Implicit,
    Method,
    OneStep,
    Params,
    Penalty,
    Problem,
    SGDUpdate,
    Unrolled,
    check_hypergradient,
)
from bilevel.hypergradients import SAMA, AdamUpdate, HypergradientCheck
from bilevel.linear import ApproximateInverse, Dense
from bilevel.products import FiniteDifference, ReverseOverReverse
from tests.support.cases import joined
from tests.support.problems.closed_forms import QuadraticBilevel, quadratic, relative_error

RATE, MANY = 0.3, 120


class Isotropic(QuadraticBilevel):
    """A is the identity over `RATE`."""

    A = torch.eye(5, dtype=torch.float64) / RATE


class Unit(QuadraticBilevel):
    """A is the identity."""

    A = torch.eye(5, dtype=torch.float64)


def solve(problem: Any, upper: Params, lower: Params, batches: Sequence[Any]) -> Params:
    y = problem.solution(upper)
    return {"head": y[:1].reshape(()), "body": y[1:].reshape(2, 2)}


def check(problem: Problem, method: Method, batches: int = 1) -> HypergradientCheck:
    _, upper, lower = quadratic()
    start = {name: torch.zeros_like(leaf) for name, leaf in lower.items()}
    return check_hypergradient(
        problem, upper, start, method, upper_batch=None, lower_batches=[None] * batches, lower_solver=solve
    )


RIGHT: dict[str, tuple[Problem, Method, int]] = {
    "implicit": (QuadraticBilevel(), Implicit(CG(50, 1e-10)), 1),
    "implicit, indefinite solver": (QuadraticBilevel(), Implicit(MINRES(50, 1e-10), hvp="auto"), 2),
    "implicit, finite differences": (QuadraticBilevel(), Implicit(CG(50, 1e-7), hvp=FiniteDifference()), 1),
    "identity where A is one": (Unit(), Implicit(Identity()), 1),
    "unrolled far": (QuadraticBilevel(), Unrolled(SGDUpdate(RATE)), MANY),
    "unrolled far, recomputed": (QuadraticBilevel(), Unrolled(SGDUpdate(RATE), recompute=True), MANY),
    "unrolled, truncated late": (QuadraticBilevel(), Unrolled(SGDUpdate(RATE), steps=MANY - 20), MANY),
    "one step where it is exact": (Isotropic(), OneStep(RATE), 1),
    "SAMA where it is exact": (Isotropic(), SAMA(SGDUpdate(RATE)), 1),
    "penalty, large": (QuadraticBilevel(), Penalty(SGDUpdate(RATE), 1e6), MANY),
}
WRONG: dict[str, tuple[Problem, Method, int, str]] = {
    "implicit, stopped early": (QuadraticBilevel(), Implicit(CG(1, 1e-10)), 1, "the solve ended NOT_CONVERGED"),
    "implicit, tikhonov": (QuadraticBilevel(), Implicit(Dense(), tikhonov=1.0), 1, "look at its residual, at tikhonov"),
    "implicit, a part": (QuadraticBilevel(), Implicit(Dense(), implicit=["body"]), 1, "and at `implicit`"),
    "identity": (QuadraticBilevel(), Implicit(Identity()), 1, "takes A for the identity"),
    "a given inverse": (
        QuadraticBilevel(),
        Implicit(ApproximateInverse(lambda b: b)),
        1,
        "ApproximateInverse solves no system",
    ),
    "unrolled near": (QuadraticBilevel(), Unrolled(SGDUpdate(RATE)), 3, "nothing was solved"),
    "unrolled, truncated": (
        QuadraticBilevel(),
        Unrolled(SGDUpdate(RATE), steps=3),
        MANY,
        "compare its own assumptions",
    ),
    "one step": (QuadraticBilevel(), OneStep(RATE, hvp=ReverseOverReverse()), 1, "OneStep solves no system"),
    "SAMA": (QuadraticBilevel(), SAMA(SGDUpdate(RATE)), 1, "SAMA solves no system"),
    "SAMA by Adam": (Isotropic(), SAMA(AdamUpdate(0.1, eps=1e-2)), 1, "SAMA solves no system"),
    "penalty, small": (QuadraticBilevel(), Penalty(SGDUpdate(RATE), 10.0), MANY, "nothing was solved"),
    "penalty, few steps": (QuadraticBilevel(), Penalty(SGDUpdate(RATE), 1e6), 3, "nothing was solved"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_method(name: str) -> None:
    problem, method, batches = RIGHT[name]
    report = check(problem, method, batches)
    assert report.verdict.startswith("right: agrees with central differences of the re-solved problem")
    assert report.agrees
    assert report.relative_error <= 1e-4
    assert report.damping == 0.0
    assert report.undamped_error is None
    assert len(report.measured) == len(joined(report.hypergradient.grad)) == 4


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_method_by_how_much_and_why(name: str) -> None:
    problem, method, batches, reason = WRONG[name]
    report = check(problem, method, batches)
    exact = check(problem, Implicit(Dense())).hypergradient.grad
    error = relative_error(joined(report.hypergradient.grad), joined(exact))
    assert not report.agrees
    assert report.verdict.startswith("wrong: differs from central differences of the re-solved problem")
    assert reason in report.verdict
    assert error > 1e-3
    # The directions are all coordinates, so that the error is that of the whole gradient.
    assert report.relative_error == pytest.approx(error, rel=1e-4)


def test_the_default_is_a_tight_implicit_method() -> None:
    _, upper, lower = quadratic()
    report = check_hypergradient(
        QuadraticBilevel(), upper, lower, upper_batch=None, lower_batches=[None], lower_solver=solve
    )
    assert report.agrees
    assert report.moved <= 1e-15
    assert report.hypergradient.solution is not None
    assert report.hypergradient.solution.residual_norms[1] <= 1e-10
