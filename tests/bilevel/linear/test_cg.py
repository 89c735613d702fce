"""Conjugate gradients, global and layer-wise, against recursions written out by hand."""

import pytest
import torch
from torch import Tensor

from bilevel import CG, Status
from bilevel.linear import Solution
from bilevel.linear.account import Account
from bilevel.linear.conjugate_gradients import ConjugateGradients
from tests.support.cases import BY_NAME, DEFINITE, INDEFINITE, Case, dense, joined, vector, with_spectrum


@pytest.mark.parametrize("rtol", [None, 0.0, 1e-3])
def test_cg_solves_the_identity_in_one_step(rtol: float | None) -> None:
    case = BY_NAME["identity"]
    solution = CG(max_iterations=10, rtol=rtol).solve(dense(case.matrix, case.split), case.b)
    assert torch.equal(joined(solution.value), case.right)
    assert solution.iterations == 1
    assert solution.residual_norms == (1.0, 0.0)
    assert solution.min_curvature == pytest.approx(1.0, rel=1e-15)
    assert solution.relative_change == 0.0
    assert solution.cosine == pytest.approx(1.0, rel=1e-15)


def textbook_cg(matrix: Tensor, b: Tensor, steps: int) -> list[Tensor]:
    """Hestenes and Stiefel's iterates."""
    x, r = torch.zeros_like(b), b.clone()
    d = r.clone()
    iterates = []
    for _ in range(steps):
        product = matrix @ d
        alpha = (r @ r) / (d @ product)
        x = x + alpha * d
        new = r - alpha * product
        d = new + (new @ new) / (r @ r) * d
        r = new
        iterates.append(x)
    return iterates


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_fixed_budget_makes_exactly_the_textbook_iterates(steps: int) -> None:
    case = BY_NAME["well-conditioned"]
    operator = dense(case.matrix, case.split)
    solution = CG(max_iterations=steps, rtol=None).solve(operator, case.b)
    torch.testing.assert_close(joined(solution.value), textbook_cg(case.matrix, case.right, steps)[-1])
    assert (solution.status, solution.iterations, solution.num_hvps) == (Status.BUDGET, steps, steps)
    directions = operator.asked
    quotients = [float(d @ case.matrix @ d / (d @ d)) for d in directions]
    assert solution.min_curvature == pytest.approx(min(quotients), rel=1e-10)


def layerwise_recursion(matrix: Tensor, b: Tensor, parts: list[slice], steps: int) -> Tensor:
    """The published recursion: step lengths and conjugation per tensor, the product of the whole."""
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    for _ in range(steps):
        product = matrix @ p
        new_x, new_r = x.clone(), r.clone()
        for part in parts:
            alpha = (r[part] @ r[part]) / (p[part] @ product[part])
            new_x[part] = x[part] + alpha * p[part]
            new_r[part] = r[part] - alpha * product[part]
        new_p = p.clone()
        for part in parts:
            new_p[part] = new_r[part] + (new_r[part] @ new_r[part]) / (r[part] @ r[part]) * p[part]
        x, r, p = new_x, new_r, new_p
    return x


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_layerwise_cg_is_the_published_recursion_with_a_true_residual(steps: int) -> None:
    case = Case("three leaves", BY_NAME["well-conditioned"].matrix, vector(8), ((3,), (2,), (3, 1)), DEFINITE)
    operator = dense(case.matrix, case.split)
    solution = CG(max_iterations=steps, rtol=None, layerwise=True).solve(operator, case.b)
    reference = layerwise_recursion(case.matrix, case.right, [slice(0, 3), slice(3, 5), slice(5, 8)], steps)
    torch.testing.assert_close(joined(solution.value), reference, rtol=1e-10, atol=1e-12)
    assert solution.residual_norms[1] == pytest.approx(case.relative_residual(solution.value), rel=1e-10)
    assert (solution.iterations, solution.num_hvps, solution.status) == (steps, steps + 1, Status.BUDGET)
    directions = operator.asked[:steps]
    smallest = min(float(d @ case.matrix @ d / (d @ d)) for d in directions)
    assert solution.min_curvature == pytest.approx(smallest, rel=1e-10)


def test_layerwise_cg_is_biased_on_a_coupled_system_and_says_so() -> None:
    # Eigenvalues near those of I + H/c in BiSSL, where the recursion does converge: to another point.
    matrix = with_spectrum([0.97, 1.0, 1.02, 1.05, 1.1, 1.2, 1.3, 1.4])
    case = Case("coupled", matrix, vector(8), ((2, 2), (), (3,)), DEFINITE)
    exact = torch.linalg.solve(matrix, case.right)

    def error(layerwise: bool, rtol: float | None) -> tuple[float, Solution]:
        solver = CG(max_iterations=30, rtol=rtol, layerwise=layerwise)
        solution = solver.solve(dense(matrix, case.split), case.b)
        return float((joined(solution.value) - exact).norm() / exact.norm()), solution

    biased, solution = error(True, 1e-8)
    assert 1e-4 < biased < 0.2
    assert solution.status is Status.NOT_CONVERGED
    assert solution.residual_norms[1] > 1e-4
    assert error(True, None)[1].status is Status.BUDGET
    assert error(False, 1e-8)[0] < 1e-8


def test_layerwise_cg_is_exact_where_leaves_are_not_coupled() -> None:
    matrix = torch.zeros(8, 8, dtype=torch.float64)
    matrix[:4, :4], matrix[4, 4] = with_spectrum([1.0, 2.0, 3.0, 4.0]), 5.0
    matrix[5:, 5:] = with_spectrum([0.5, 1.0, 10.0])
    case = Case("blocks", matrix, vector(8), ((2, 2), (), (3,)), DEFINITE)
    solution = CG(max_iterations=8, rtol=1e-10, layerwise=True).solve(dense(matrix, case.split), case.b)
    assert solution.status is Status.CONVERGED
    assert solution.iterations <= 4
    torch.testing.assert_close(joined(solution.value), torch.linalg.solve(matrix, case.right))


def test_layerwise_cg_with_one_leaf_is_cg() -> None:
    case = Case("one leaf", BY_NAME["well-conditioned"].matrix, vector(8), ((8,),), DEFINITE)
    for steps in (1, 3, 5):
        one, other = (
            CG(max_iterations=steps, rtol=None, layerwise=flag).solve(dense(case.matrix, case.split), case.b).value
            for flag in (False, True)
        )
        torch.testing.assert_close(one, other, rtol=1e-13, atol=0.0)


PARTS = [slice(0, 3), slice(3, 5), slice(5, 8)]
SPLIT = ((3,), (2,), (3, 1))
EVEN = with_spectrum([-2.0, -1.0, -0.5, 0.5, 1.0, 1.5, 2.0, 3.0])
NEAR_ONE = with_spectrum([-0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5])
THROUGH = [
    *(Case(f"indefinite {seed}", EVEN, vector(8, seed), SPLIT, INDEFINITE) for seed in (5, 7, 9)),
    *(Case(f"indefinite near I {seed}", NEAR_ONE, vector(8, seed), SPLIT, INDEFINITE) for seed in (7, 8)),
    Case("negative definite", BY_NAME["negative definite"].matrix, vector(8), SPLIT, INDEFINITE),
    Case("of growing residual", EVEN, vector(8, 3), SPLIT, INDEFINITE),
]


def through(case: Case, steps: int, *, watched: bool) -> Solution:
    """As ``CG(steps, None, layerwise=True, through_negative_curvature=True)`` runs on a CPU, and on a GPU."""
    if watched:
        solver = CG(steps, None, layerwise=True, through_negative_curvature=True)
        return solver.solve(dense(case.matrix, case.split), case.b)
    account = Account(dense(case.matrix, case.split), case.b, steps, None)
    with torch.no_grad():
        run = ConjugateGradients(account, layerwise=True, through=True, watched=False)
        return run.solve(None, case.b, 1.0)


@pytest.mark.parametrize("watched", [True, False], ids=["watched", "read at the end"])
@pytest.mark.parametrize("steps", [2, 4, 7])
@pytest.mark.parametrize("case", THROUGH, ids=str)
def test_layerwise_cg_makes_all_its_iterations_through_negative_curvature(
    case: Case, steps: int, watched: bool
) -> None:
    solution = through(case, steps, watched=watched)
    reference = layerwise_recursion(case.matrix, case.right, PARTS, steps)
    torch.testing.assert_close(joined(solution.value), reference, rtol=1e-8, atol=1e-10)
    assert solution.iterations == steps
    assert solution.residual_norms[1] == pytest.approx(case.relative_residual(solution.value), rel=1e-8)
    assert solution.min_curvature is not None
    assert solution.min_curvature < -0.1
    grown = solution.residual_norms[1] > 10.0
    assert grown == (case is THROUGH[-1])
    assert solution.status is (Status.DIVERGED if grown else Status.NEGATIVE_CURVATURE_PASSED)
    assert solution.status.ok == (not grown)
    without = CG(steps, None, layerwise=True).solve(dense(case.matrix, case.split), case.b)
    assert without.iterations < steps
    assert without.status is Status.NEGATIVE_CURVATURE


@pytest.mark.parametrize("watched", [True, False], ids=["watched", "read at the end"])
def test_without_negative_curvature_the_leave_changes_nothing(watched: bool) -> None:
    case = Case("definite", BY_NAME["well-conditioned"].matrix, vector(8), SPLIT, DEFINITE)
    found = through(case, 4, watched=watched)
    plain = CG(4, None, layerwise=True).solve(dense(case.matrix, case.split), case.b)
    assert (found.status, found.iterations) == (Status.BUDGET, 4)
    torch.testing.assert_close(joined(found.value), joined(plain.value), rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("watched", [True, False], ids=["watched", "read at the end"])
@pytest.mark.parametrize(
    ("name", "status"),
    [("NaN in the operator", Status.NON_FINITE), ("zero operator", Status.INCONSISTENT)],
)
def test_numbers_that_are_not_finite_and_null_vectors_still_end_it(name: str, status: Status, watched: bool) -> None:
    solution = through(BY_NAME[name], 5, watched=watched)
    assert solution.status is status
    assert solution.iterations == 0
    assert bool(joined(solution.value).isfinite().all())


def test_a_tolerance_is_judged_as_ever_past_negative_curvature() -> None:
    case = THROUGH[1]
    solution = CG(7, 1e-6, layerwise=True, through_negative_curvature=True).solve(
        dense(case.matrix, case.split), case.b
    )
    assert solution.iterations == 7
    assert solution.status is Status.NOT_CONVERGED


def test_the_global_method_goes_through_no_negative_curvature() -> None:
    with pytest.raises(ValueError, match=r"through_negative_curvature=True is for layerwise=True.*MINRES"):
        CG(through_negative_curvature=True)
    with pytest.raises(TypeError, match="CG: through_negative_curvature must be True or False, got 'yes'"):
        CG(layerwise=True, through_negative_curvature="yes")  # pyright: ignore[reportArgumentType]


def test_curvature_is_judged_over_the_whole_tree() -> None:
    # A leaf's share of d'Ad is negative here although A is definite.
    matrix = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    case = Case("shares", matrix, torch.tensor([1.0, -5.0], dtype=torch.float64), ((1,), (1,)), DEFINITE)
    assert float(case.right[0] * (matrix @ case.right)[0]) < 0.0
    solution = CG(max_iterations=1, rtol=None, layerwise=True).solve(dense(matrix, case.split), case.b)
    assert solution.status is Status.BUDGET
    assert solution.min_curvature is not None
    assert solution.min_curvature > 0.0


def test_cg_keeps_the_best_iterate_before_negative_curvature() -> None:
    case = BY_NAME["indefinite"]
    solution = CG(max_iterations=60, rtol=1e-10).solve(dense(case.matrix, case.split), case.b)
    assert solution.status is Status.NEGATIVE_CURVATURE
    assert solution.min_curvature is not None
    assert solution.min_curvature < 0.0
    made = textbook_cg(case.matrix, case.right, solution.iterations)
    residuals = [float((case.right - case.matrix @ x).norm()) for x in made]
    torch.testing.assert_close(joined(solution.value), made[residuals.index(min(residuals))])
