"""The Neumann series against its closed form, and its scale."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bilevel import Neumann, Status
from bilevel.linear import Solution
from bilevel.linear.account import Account
from bilevel.linear.solvers.neumann import _Series, ritz_values
from tests.support.cases import BY_NAME, CASES, DEFINITE, INDEFINITE, Case, dense, joined, vector, with_spectrum


@pytest.mark.parametrize("scale", [0.11, 0.3, 0.45])
@pytest.mark.parametrize("terms", [1, 2, 7])
def test_neumann_leaves_exactly_the_power_of_its_step(terms: int, scale: float) -> None:
    case = BY_NAME["well-conditioned"]
    operator = dense(case.matrix, case.split)
    solution = Neumann(max_iterations=terms, scale=scale).solve(operator, case.b)
    step = torch.eye(8, dtype=torch.float64) - scale * case.matrix
    left = torch.linalg.matrix_power(step, terms) @ torch.linalg.solve(case.matrix, case.right)
    torch.testing.assert_close(torch.linalg.solve(case.matrix, case.right) - joined(solution.value), left)
    assert (solution.status, solution.num_hvps) == (Status.BUDGET, terms)


@pytest.mark.parametrize("terms", [1, 3, 8])
def test_neumann_equals_unrolling_from_the_optimum(terms: int) -> None:
    case, scale = BY_NAME["well-conditioned"], 0.3
    optimum = torch.linalg.solve(case.matrix, vector(8, seed=4))
    # dF/dx through the last steps y <- y - scale (A y - x), started at the optimum for x, is the truncated series.
    x = vector(8, seed=4).requires_grad_()
    y = optimum
    for _ in range(terms):
        y = y - scale * (case.matrix @ y - x)
    (unrolled,) = torch.autograd.grad(case.right @ y, x)
    solution = Neumann(max_iterations=terms, scale=scale).solve(dense(case.matrix, case.split), case.b)
    torch.testing.assert_close(joined(solution.value), unrolled, rtol=1e-12, atol=1e-12)


def test_neumann_detects_divergence_at_the_first_growth() -> None:
    # I + H/c with ||H||/c = 2 and the step 1 of the literature.
    matrix = torch.eye(6, dtype=torch.float64) + with_spectrum([2.0, 0.5, 0.1, 0.0, 0.0, -0.1])
    case = Case("step 1", matrix, vector(6), ((6,),), DEFINITE)
    solution = Neumann(max_iterations=50, scale=1.0).solve(dense(matrix, case.split), case.b)
    assert solution.status is Status.DIVERGED
    assert solution.iterations < 10
    series, term = torch.zeros_like(case.right), case.right
    residuals = []
    for _ in range(10):
        series, term = series + term, term - matrix @ term
        residuals.append((float((case.right - matrix @ series).norm() / case.right.norm()), series))
    best = min(residuals, key=lambda pair: pair[0])
    assert min(best[0], case.relative_residual(case.b)) == pytest.approx(solution.residual_norms[1], rel=1e-10)
    automatic = Neumann(max_iterations=80, rtol=1e-8).solve(dense(matrix, case.split), case.b)
    assert automatic.status is Status.CONVERGED


def test_neumann_keeps_its_scale_for_later_right_hand_sides() -> None:
    case = BY_NAME["well-conditioned"]
    operator, solver = dense(case.matrix, case.split), Neumann(max_iterations=4)
    state = solver.prepare(operator)
    first = solver.solve(operator, case.b, state=state)
    second = solver.solve(operator, case.split(vector(8, seed=9)), state=state)
    # Five Lanczos steps, and of the four terms the first has the product of the first of these.
    assert (first.num_hvps, second.num_hvps) == (8, 4)
    assert len(operator.asked) == 12
    assert state.value == pytest.approx(1.0 / (1.1 * 4.0), rel=0.02)


@pytest.mark.parametrize(("start", "products"), [(None, 7), ("x0", 9)])
def test_the_automatic_scale_is_a_given_scale_that_was_found(start: str | None, products: int) -> None:
    case = BY_NAME["well-conditioned"]
    operator, x0 = dense(case.matrix, case.split), None if start is None else case.split(vector(8, seed=3))
    solver = Neumann(max_iterations=3)
    state = solver.prepare(operator)
    found = solver.solve(operator, case.b, x0=x0, state=state)
    # From a start there is one more, with it.
    assert found.num_hvps == len(operator.asked) == products
    assert state.value is not None
    given = Neumann(max_iterations=3, scale=state.value).solve(dense(case.matrix, case.split), case.b, x0=x0)
    assert torch.equal(joined(found.value), joined(given.value))


def test_ritz_values_of_a_full_krylov_space_are_the_eigenvalues() -> None:
    case = Case("small", with_spectrum([-1.0, 2.0, 5.0]), vector(3), ((3,),), INDEFINITE)
    operator = dense(case.matrix, case.split)
    assert ritz_values(operator, case.b, 8) == pytest.approx((-1.0, 2.0, 5.0))
    assert len(operator.asked) == 3
    eye = dense(torch.eye(3, dtype=torch.float64), case.split)
    assert ritz_values(eye, case.b, 8) == pytest.approx((1.0,))


def series(case: Case, terms: int, *, watched: bool) -> Solution:
    b = case.split(case.right / case.length)
    account = Account(dense(case.matrix, case.split), b, terms, None)
    with torch.no_grad():
        return _Series(account, 0.05, watched=watched).sum(None)


@pytest.mark.parametrize("terms", [1, 3, 12])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reading_at_the_end_changes_nothing(case: Case, terms: int) -> None:
    if not bool(case.right.isfinite().all()):
        pytest.skip("refused before any term")
    seen, blind = series(case, terms, watched=True), series(case, terms, watched=False)
    assert blind.status is seen.status
    assert blind.iterations == seen.iterations
    assert blind.residual_curve == seen.residual_curve
    assert blind.residual_norms == pytest.approx(seen.residual_norms, nan_ok=True)
    assert blind.min_curvature == seen.min_curvature
    assert torch.equal(joined(blind.value), joined(seen.value))


def test_a_fixed_number_of_terms_reads_nothing_between_its_products() -> None:
    case = BY_NAME["well-conditioned"]

    def reads(terms: int) -> int:
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            assert series(case, terms, watched=False).iterations == terms
        return sum(event.count for event in recorded.key_averages() if event.key == "aten::_local_scalar_dense")

    assert reads(12) == reads(4)
