"""Ritz values and residual curves that solves leave behind."""

from collections.abc import Callable

import pytest
import torch

from bilevel import CG, Identity, Neumann, Params, Status
from bilevel.linear import Dense, Solver
from bilevel.linear.lanczos import conjugate_block, ritz_range, ritz_values
from bilevel.linear.solvers.minres import MINRES
from tests.support.cases import (
    BY_NAME,
    CASES,
    DEFINITE,
    INDEFINITE,
    Case,
    Counting,
    dense,
    joined,
    vector,
    with_spectrum,
)
from tests.support.solver_checks import check_ritz_range, solve_case


def projected(case: Case, steps: int) -> tuple[float, float]:
    """Extreme eigenvalues of A on the Krylov space of b, from its orthonormal basis."""
    basis = [case.right / case.right.norm()]
    for _ in range(steps - 1):
        w = case.matrix @ basis[-1]
        for _ in range(2):
            for q in basis:
                w = w - (q @ w) * q
        basis.append(w / w.norm())
    space = torch.stack(basis, dim=1)
    values = torch.linalg.eigvalsh(space.T @ case.matrix @ space)
    return float(values[0]), float(values[-1])


@pytest.mark.parametrize("steps", [1, 2, 4, 6])
@pytest.mark.parametrize("solver", [CG, MINRES])
@pytest.mark.parametrize("name", ["well-conditioned", "ill-conditioned"])
def test_ritz_range_is_that_of_the_krylov_space(name: str, solver: type[CG] | type[MINRES], steps: int) -> None:
    case = BY_NAME[name]
    solution, operator = solve_case(solver(steps, rtol=None), case)
    assert solution.ritz_range == pytest.approx(projected(case, steps), rel=1e-8)
    assert solution.num_hvps == len(operator.asked) == steps


def test_the_direction_of_a_breakdown_counts() -> None:
    case = BY_NAME["indefinite"]
    solution, _ = solve_case(CG(60, rtol=1e-9), case)
    assert solution.status is Status.NEGATIVE_CURVATURE
    assert solution.ritz_range == pytest.approx(projected(case, solution.iterations + 1), rel=1e-8)
    assert solution.ritz_range is not None
    assert solution.ritz_range[0] < 0.0
    first, _ = solve_case(CG(60), BY_NAME["negative definite"])
    b, matrix = BY_NAME["negative definite"].right, BY_NAME["negative definite"].matrix
    quotient = float(b @ matrix @ b / (b @ b))
    assert first.ritz_range == pytest.approx((quotient, quotient))


@pytest.mark.parametrize("case", [c for c in CASES if "NaN" not in c.name], ids=str)
@pytest.mark.parametrize("solver", [CG(60, rtol=None), MINRES(60, rtol=None), Neumann(60), Dense()], ids=str)
def test_ritz_values_lie_among_the_eigenvalues_also_past_convergence(case: Case, solver: Solver) -> None:
    solution, _ = solve_case(solver, case)
    assert solution.ritz_range is not None
    check_ritz_range(case, solution, 1e-13)


def test_ritz_ranges_of_the_other_solvers() -> None:
    case = BY_NAME["indefinite"]
    exact, _ = solve_case(Dense(), case)
    assert exact.ritz_range == pytest.approx((-1.0, 4.0))
    case = BY_NAME["well-conditioned"]
    operator, solver = dense(case.matrix, case.split), Neumann(3)
    state = solver.prepare(operator)
    expected = projected(case, 5)
    for right in (case.b, case.split(vector(8, seed=5))):
        assert solver.solve(operator, right, state=state).ritz_range == pytest.approx(expected, rel=1e-8)
    for without in (Identity(), Neumann(scale=0.2), CG(layerwise=True)):
        assert solve_case(without, case)[0].ritz_range is None


@pytest.mark.parametrize(
    "make", [lambda k: CG(k, rtol=None), lambda k: MINRES(k, None), lambda k: Neumann(k, scale=0.3)]
)
def test_the_residual_curve_is_that_of_the_iterates(make: Callable[[int], Solver]) -> None:
    case = BY_NAME["well-conditioned"]
    solution, _ = solve_case(make(6), case)
    assert len(solution.residual_curve) == solution.iterations == 6
    for steps, reported in enumerate(solution.residual_curve, start=1):
        shorter, _ = solve_case(make(steps), case)
        assert reported == pytest.approx(case.relative_residual(shorter.value), rel=1e-8)


def test_nothing_iterated_leaves_no_curve() -> None:
    case = BY_NAME["well-conditioned"]
    for solver in (Dense(), Identity()):
        assert solve_case(solver, case)[0].residual_curve == ()
    exact = case.split(torch.linalg.solve(case.matrix, case.right))
    assert CG().solve(dense(case.matrix, case.split), case.b, x0=exact).residual_curve == ()


@pytest.mark.parametrize("spread", [1e-2, 1e-6, 1e-10])
@pytest.mark.parametrize("center", [1.0, -1e3])
def test_the_range_near_a_multiple_of_the_identity(center: float, spread: float) -> None:
    """Products are then nearly parallel to their vectors, and orthogonalising once leaves rounding for a basis."""
    values = center * (1.0 + spread * torch.linspace(-1.0, 1.0, 60, dtype=torch.float64))
    case = Case("near the identity", with_spectrum(values.tolist()), vector(60), ((60,),), INDEFINITE)
    found = torch.tensor(ritz_values(dense(case.matrix, case.split), case.b, 40), dtype=torch.float64)
    assert len(found) == 40
    # To the rounding of a product.
    width = abs(center) * (spread + 1e-13)
    assert bool((abs(found - center) <= width).all())
    assert float(found.max() - found.min()) == pytest.approx(2 * abs(center) * spread, rel=1e-2)


def test_a_long_solve_costs_no_large_eigenvalue_problem() -> None:
    values = torch.logspace(-6, 0, 600, dtype=torch.float64)
    case = Case("long", torch.diag(values), vector(600), ((600,),), DEFINITE)
    solution, _ = solve_case(CG(500, rtol=None), case)
    assert solution.iterations == 500
    assert solution.ritz_range is not None
    low, high = solution.ritz_range
    assert 1e-6 <= low < 1e-3
    assert high == pytest.approx(1.0, rel=1e-6)


def test_blocks_are_read_up_to_what_is_finite() -> None:
    nan = float("nan")
    assert ritz_range([]) is None
    assert ritz_range([([], []), ([nan], [])]) is None
    assert ritz_range([([2.0], []), ([1.0, nan], [0.5])]) == (1.0, 2.0)
    assert ritz_range([([1.0, 3.0], [nan])]) == (1.0, 1.0)
    assert ritz_range([([0.0, 0.0, 9.0], [2.0, nan])]) == pytest.approx((-2.0, 2.0))
    assert conjugate_block([], []) == ([], [])


def test_ritz_values_of_a_broken_operator_are_nan() -> None:
    case = Case("small", with_spectrum([-1.0, 2.0, 5.0]), vector(3), ((3,),), INDEFINITE)
    operator = dense(case.matrix, case.split)
    assert ritz_values(operator, case.b, 8) == pytest.approx((-1.0, 2.0, 5.0))
    assert len(operator.asked) == 3

    def broken(v: Params) -> Params:
        return case.split(case.matrix @ joined(v) * float("nan"))

    values = ritz_values(Counting(broken), case.b, 4)
    assert len(values) == 1
    assert values[0] != values[0]
