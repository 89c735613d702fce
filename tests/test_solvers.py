"""Every solver on every case and through every provider, against dense algebra."""

import math
from typing import Any

import pytest
import torch
from cases import (
    BY_NAME,
    CASES,
    CONSISTENT,
    DEFINITE,
    INCONSISTENT,
    INDEFINITE,
    NON_FINITE,
    Case,
    Counting,
    Quadratic,
    dense,
    joined,
    vector,
    with_spectrum,
)
from torch import Tensor

from bilevel import (
    CG,
    Dense,
    FiniteDifference,
    ForwardOverReverse,
    HVPProvider,
    Identity,
    Neumann,
    Params,
    ReverseOverReverse,
    Solution,
    Solver,
    Status,
    linearize,
)
from bilevel.solvers.neumann import ritz_values

PROVIDERS: dict[str, HVPProvider] = {
    "reverse": ReverseOverReverse(),
    "reverse, kept": ReverseOverReverse(keep_graph=True),
    "forward": ForwardOverReverse(),
    "central differences": FiniteDifference(),
    "one-sided differences": FiniteDifference(central=False),
}


def solver_for(name: str, rtol: float) -> Solver:
    return {
        "cg": CG(max_iterations=60, rtol=rtol),
        "layer-wise cg": CG(max_iterations=20, rtol=rtol, layerwise=True),
        "neumann": Neumann(max_iterations=120, rtol=rtol),
        "dense": Dense(),
        "identity": Identity(),
    }[name]


def provided(case: Case, hvp: HVPProvider) -> Counting:
    """The case's operator as the system of a quadratic problem makes it, counted; two batches whose mean is A."""
    y = {name: leaf.detach() for name, leaf in case.split(0.1 * vector(len(case.right), seed=7)).items()}
    system = linearize(Quadratic(case), {}, y, [0.5, 1.5], hvp=hvp)
    return Counting(system.operator, exact=system.operator.exact)


def check_honest(case: Case, operator: Counting, solution: Solution, error: float) -> None:
    """What holds of any solution whatever: a true residual, a true count, and no success that is none."""
    assert solution.num_hvps == len(operator.asked)
    assert {n: t.shape for n, t in solution.value.items()} == {n: t.shape for n, t in case.b.items()}
    if case.kind == NON_FINITE:
        return
    assert all(torch.isfinite(leaf).all() for leaf in solution.value.values())
    true = case.relative_residual(solution.value)
    reported = solution.residual_norms[1]
    if not math.isnan(reported):
        size = 1.0 + float(torch.linalg.matrix_norm(case.matrix, 2) * (joined(solution.value) / case.length).norm())
        assert reported == pytest.approx(true, rel=0.15, abs=20 * error * size)
    if solution.status is Status.CONVERGED:
        assert true <= max(1e-9, 10 * error) * 1.2
    x, b = joined(solution.value) / case.length, case.right / case.length
    assert solution.departure == pytest.approx(float((x - b).norm()), rel=1e-9, abs=1e-12)
    assert solution.cosine == pytest.approx(float(x @ b / x.norm()), rel=1e-9, abs=1e-12)


def expected(solver: str, case: Case) -> set[Status]:
    if solver == "identity":
        return {Status.NON_FINITE if case.right.isnan().any() else Status.BUDGET}
    if case.kind == NON_FINITE:
        return {Status.NON_FINITE}
    if solver == "layer-wise cg":
        return set(Status) - {Status.NON_FINITE, Status.BUDGET}
    found = {
        DEFINITE: {Status.CONVERGED},
        CONSISTENT: {Status.CONVERGED},
        INCONSISTENT: {Status.INCONSISTENT},
        INDEFINITE: {Status.CONVERGED} if solver == "dense" else {Status.NEGATIVE_CURVATURE},
    }[case.kind]
    if solver == "neumann" and case.kind == INDEFINITE:
        return {Status.NEGATIVE_CURVATURE, Status.DIVERGED}
    if solver == "neumann" and case.name == "ill-conditioned":
        return {Status.NOT_CONVERGED}
    return found


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("solver", ["cg", "layer-wise cg", "neumann", "dense", "identity"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_right_answer_or_right_status(case: Case, solver: str, provider: str) -> None:
    hvp = PROVIDERS[provider]
    operator = provided(case, hvp)
    scale = float(torch.linalg.matrix_norm(case.matrix.nan_to_num(), 2))
    # Differences divide rounding of gradients of size one by a step of 6e-6 (1.5e-8 for one-sided ones).
    error = 2.3e-16 if hvp.exact else (1e-10 if provider.startswith("central") else 1e-7) / min(1.0, max(scale, 1e-6))
    if not hvp.exact and case.name in ("tiny operator", "zero operator"):
        pytest.skip("what differences make of an operator below their own rounding is noise")
    solution = solver_for(solver, 1e-9 if hvp.exact else 1e-4).solve(operator, case.b)
    if hvp.exact:
        check_honest(case, operator, solution, error)
        assert solution.status in expected(solver, case)
    else:
        check_status_under_noise(solver, case, solution)
    x = joined(solution.value) / case.length
    if solver == "identity" or case.kind == NON_FINITE:
        assert torch.equal(joined(solution.value).nan_to_num(7.0), case.right.nan_to_num(7.0))
    elif solution.status is Status.CONVERGED and (hvp.exact or case.name != "ill-conditioned"):
        conditioned = 1e6 if case.name == "ill-conditioned" else 10
        tolerance = 1e-9 * conditioned if hvp.exact else 2e-3
        exact = case.solution() / case.length
        assert float((x - exact).norm()) <= tolerance * float(exact.norm())
    assert float(x.norm()) > 0.0 or x.isnan().any(), "a term was silenced"


def check_status_under_noise(solver: str, case: Case, solution: Solution) -> None:
    failing = case.kind in (INCONSISTENT, NON_FINITE) or (case.kind == INDEFINITE and solver != "dense")
    if solver == "identity" or solver == "layer-wise cg":
        return
    if failing:
        assert not solution.status.ok
    elif case.name != "ill-conditioned":
        assert solution.status.ok
