"""MINRES against dense algebra and scipy's implementation."""

import math
from dataclasses import replace
from typing import Any

import pytest
import scipy.sparse.linalg
import torch

from bilevel import CG, Params, Status
from bilevel.linear.solvers.minres import MINRES
from tests.support.cases import (
    BY_NAME,
    CASES,
    CONSISTENT,
    DEFINITE,
    INCONSISTENT,
    INDEFINITE,
    Case,
    Counting,
    dense,
    joined,
    vector,
    with_spectrum,
)
from tests.support.solver_checks import check_honest, in_single_precision, relative_error, solve_case

CONDITION = {"ill-conditioned": 1e6}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_right_answer_or_right_status(case: Case) -> None:
    solution, operator = solve_case(MINRES(60, rtol=1e-9), case)
    check_honest(case, operator, solution, rtol=1e-9)
    if case.kind in (DEFINITE, INDEFINITE, CONSISTENT):
        assert solution.status is Status.CONVERGED
        assert relative_error(case, solution) <= 1e-9 * CONDITION.get(case.name, 10.0)
    elif case.kind == INCONSISTENT:
        assert solution.status is Status.INCONSISTENT


@pytest.mark.parametrize("case", [c for c in CASES if in_single_precision(c) and c.name != "ill-conditioned"], ids=str)
def test_single_precision(case: Case) -> None:
    solution, operator = solve_case(MINRES(60, rtol=1e-4), case, torch.float32)
    check_honest(case, operator, solution, rtol=1e-4, error=1.2e-7)
    if case.kind in (DEFINITE, INDEFINITE, CONSISTENT):
        assert solution.status is Status.CONVERGED
        assert relative_error(case, solution) <= 1e-3
    elif case.kind == INCONSISTENT:
        assert solution.status is Status.INCONSISTENT


def test_beyond_single_precision_says_so() -> None:
    # eps cond(A) = 0.12: no algorithm in float32 gets near the solution.
    case = BY_NAME["ill-conditioned"]
    for seed in range(40):
        # Every order of the variables rounds in its own way, as every CPU does.
        order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
        permuted = replace(case, matrix=case.matrix[order][:, order], right=case.right[order])
        solution, operator = solve_case(MINRES(60, rtol=1e-4), permuted, torch.float32)
        check_honest(permuted, operator, solution, rtol=1e-4, error=1.2e-7)
        assert solution.status is Status.NOT_CONVERGED


def test_a_fixed_budget_that_ends_in_a_grown_residual_is_no_success() -> None:
    # eps cond(A)^2 is far above 1 and no tolerance was missed: what comes back must not pass for a solution.
    case = BY_NAME["ill-conditioned"]
    for seed in range(40):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
        permuted = replace(case, matrix=case.matrix[order][:, order], right=case.right[order])
        solution, _ = solve_case(MINRES(60, rtol=None), permuted, torch.float32)
        assert not (solution.status.ok and torch.equal(joined(solution.value), permuted.right.float()))


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("name", ["well-conditioned", "indefinite", "ill-conditioned", "negative definite"])
def test_iterates_are_scipys(name: str, steps: int) -> None:
    case = BY_NAME[name]
    solution, operator = solve_case(MINRES(steps, rtol=None), case)
    reference, _ = scipy.sparse.linalg.minres(case.matrix.numpy(), case.right.numpy(), maxiter=steps, rtol=0.0)
    torch.testing.assert_close(joined(solution.value), torch.from_numpy(reference), rtol=1e-9, atol=1e-11)
    assert (solution.status, solution.iterations, solution.num_hvps) == (Status.BUDGET, steps, len(operator.asked))


def test_iterates_minimize_the_residual_over_the_krylov_space() -> None:
    case = BY_NAME["indefinite"]
    curve = []
    for steps in range(1, 8):
        powers = [case.right]
        for _ in range(steps - 1):
            powers.append(case.matrix @ powers[-1] / (case.matrix @ powers[-1]).norm())
        space = torch.linalg.qr(torch.stack(powers, dim=1)).Q
        best = torch.linalg.lstsq(case.matrix @ space, case.right).solution
        curve.append(float((case.right - case.matrix @ space @ best).norm() / case.right.norm()))
    solution, _ = solve_case(MINRES(7, rtol=None), case)
    assert solution.residual_curve == pytest.approx(curve, rel=1e-8)


@pytest.mark.parametrize("name", ["well-conditioned", "indefinite", "singular, consistent"])
def test_ritz_range_of_a_full_krylov_space_is_the_range_of_live_eigenvalues(name: str) -> None:
    case = BY_NAME[name]
    solution, _ = solve_case(MINRES(60, rtol=1e-9), case)
    live = [float(v) for v in torch.linalg.eigvalsh(case.matrix) if abs(v) > 1e-9]
    assert solution.ritz_range == pytest.approx((min(live), max(live)), rel=1e-7)


def test_ritz_range_after_two_steps_is_that_of_the_projected_matrix() -> None:
    case = BY_NAME["indefinite"]
    solution, _ = solve_case(MINRES(2, rtol=None), case)
    space = torch.linalg.qr(torch.stack([case.right, case.matrix @ case.right], dim=1)).Q
    projected = torch.linalg.eigvalsh(space.T @ case.matrix @ space)
    assert solution.ritz_range == pytest.approx((float(projected[0]), float(projected[1])), rel=1e-10)


def test_negative_curvature_is_reported_and_no_failure() -> None:
    case = BY_NAME["indefinite"]
    solution, operator = solve_case(MINRES(60, rtol=1e-9), case)
    assert solution.status is Status.CONVERGED
    assert solution.min_curvature is not None
    # The Lanczos vectors are what the operator was asked for; the residuals before each step count as well.
    quotients = [float(v @ case.matrix @ v / (v @ v)) for v in operator.asked[:8]]
    assert solution.min_curvature <= min(quotients) + 1e-10
    residuals = [case.right - case.matrix @ joined(solve_case(MINRES(k, None), case)[0].value) for k in range(1, 8)]
    quotients += [float(r @ case.matrix @ r / (r @ r)) for r in residuals]
    assert solution.min_curvature == pytest.approx(min(quotients), rel=1e-6)
    assert solution.min_curvature < 0.0


def test_a_curvature_that_vanishes_at_the_first_step_is_no_breakdown() -> None:
    # b'Ab = 0: the first iterate is 0, the second exact.
    matrix = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    case = Case("balanced", matrix, torch.tensor([1.0, 1.0], dtype=torch.float64), ((1,), ()), INDEFINITE)
    solution, _ = solve_case(MINRES(5, rtol=1e-9), case)
    assert solution.status is Status.CONVERGED
    torch.testing.assert_close(joined(solution.value), torch.tensor([1.0, -1.0], dtype=torch.float64))
    first, operator = solve_case(MINRES(1, rtol=1e-9), case)
    assert torch.equal(joined(first.value), case.right), "0 would silence the term"
    assert first.status is Status.NOT_CONVERGED
    check_honest(case, operator, first, rtol=1e-9)


@pytest.mark.parametrize("name", ["singular, inconsistent", "unused variables, in demand"])
def test_an_inconsistent_system_gives_the_least_squares_solution_of_least_norm(name: str) -> None:
    case = BY_NAME[name]
    solution, _ = solve_case(MINRES(60, rtol=1e-3), case)
    assert solution.status is Status.INCONSISTENT
    torch.testing.assert_close(joined(solution.value), case.solution(), rtol=1e-7, atol=1e-7)
    least = float((case.right - case.matrix @ case.solution()).norm() / case.right.norm())
    assert solution.residual_norms[1] == pytest.approx(least, rel=1e-9)


def test_from_a_start_an_inconsistent_system_gives_the_nearest_least_squares_solution() -> None:
    case, start = BY_NAME["singular, inconsistent"], vector(8, seed=6)
    solution = MINRES(60).solve(dense(case.matrix, case.split), case.b, x0=case.split(start))
    assert solution.status is Status.INCONSISTENT
    null = torch.linalg.eigh(case.matrix).eigenvectors[:, :2]
    torch.testing.assert_close(joined(solution.value), case.solution() + null @ (null.T @ start), rtol=1e-6, atol=1e-6)


def test_a_right_hand_side_in_the_null_space_is_given_back() -> None:
    case = BY_NAME["unused variables, in demand"]
    null = torch.cat([torch.zeros(5, dtype=torch.float64), vector(3)])
    solution = MINRES(20).solve(dense(case.matrix, case.split), case.split(null))
    assert solution.status is Status.INCONSISTENT
    assert torch.equal(joined(solution.value), null)
    assert solution.residual_norms[1] == pytest.approx(1.0)


def test_a_residual_that_rounding_took_away_from_the_recursion_is_measured() -> None:
    # Condition 1e7 costs the recursion a tenth of its residual here, long before the residual is at rounding level.
    values = [(-1.0) ** k * 10.0 ** (-7.0 * k / 11.0) for k in range(12)]
    case = Case("very ill-conditioned", with_spectrum(values), vector(12), ((12,),), INDEFINITE)
    solution, operator = solve_case(MINRES(100, rtol=1e-6), case)
    true = case.relative_residual(solution.value)
    assert solution.status is Status.CONVERGED
    assert solution.residual_norms[1] == pytest.approx(true, rel=1e-3)
    assert solution.num_hvps == len(operator.asked)


def test_nothing_is_measured_twice() -> None:
    solution, operator = solve_case(MINRES(20), BY_NAME["zero operator"])
    # One Lanczos step, and the residual of the b that is given back.
    assert (solution.iterations, len(operator.asked)) == (0, 2)


@pytest.mark.parametrize("smallest", [1e-4, -1e-4])
def test_small_eigenvalues_are_not_taken_for_null_ones_in_single_precision(smallest: float) -> None:
    # After one step the residual lies along the small eigenvalue alone, where A is small but not zero.
    matrix = torch.diag(torch.tensor([smallest, 1.0, 1.0], dtype=torch.float64))
    case = Case("small eigenvalue", matrix, torch.ones(3, dtype=torch.float64), ((3,),), INDEFINITE)
    solution, _ = solve_case(MINRES(10, rtol=1e-3), case, torch.float32)
    assert solution.status is Status.CONVERGED
    assert relative_error(case, solution) < 5e-3


def test_a_start_is_used_and_kept_in_order() -> None:
    case = BY_NAME["indefinite"]
    exact = case.split(torch.linalg.solve(case.matrix, case.right))
    operator = dense(case.matrix, case.split)
    solution = MINRES(rtol=1e-8).solve(operator, case.b, x0={name: exact[name] for name in reversed(exact)})
    assert (solution.iterations, solution.num_hvps) == (0, len(operator.asked))
    assert list(solution.value) == list(case.b)
    torch.testing.assert_close(solution.value, exact)
    near = case.split(joined(exact) + 1e-3 * vector(8, seed=4))
    warm = MINRES(3, rtol=None).solve(dense(case.matrix, case.split), case.b, x0=near)
    assert warm.residual_norms[0] == pytest.approx(case.relative_residual(near), rel=1e-10)
    assert warm.residual_norms[1] == pytest.approx(case.relative_residual(warm.value), rel=1e-8)
    assert warm.residual_norms[1] < warm.residual_norms[0] < 0.02


@pytest.mark.parametrize("name", ["well-conditioned", "ill-conditioned", "indefinite", "singular, consistent"])
def test_iterations_past_convergence_do_no_harm(name: str) -> None:
    case = BY_NAME[name]
    solution, operator = solve_case(MINRES(60, rtol=None), case)
    assert solution.status is Status.CONVERGED
    size = 1.0 + float(torch.linalg.matrix_norm(case.matrix, 2) * joined(solution.value).norm()) / case.length
    assert case.relative_residual(solution.value) < 4e-15 * size
    assert len(operator.asked) < 40


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float32, 2.0**-100), (torch.float32, 2.0**110), (torch.float64, 2.0**-800), (torch.float64, 2.0**900)],
)
def test_scale_equivariance_to_the_bit(dtype: torch.dtype, factor: float) -> None:
    case = BY_NAME["indefinite"]
    matrix = case.matrix.to(dtype)
    one, other = (
        MINRES(rtol=1e-5).solve(dense(matrix, case.split), case.split(case.right.to(dtype) * f)) for f in (1.0, factor)
    )
    assert torch.equal(joined(other.value), joined(one.value) * factor)
    assert (one.status, one.residual_norms, one.ritz_range) == (other.status, other.residual_norms, other.ritz_range)


@pytest.mark.parametrize("shapes", [((8,),), ((2, 2), (), (3,)), ((), (1, 7))])
def test_the_split_into_leaves_does_not_matter(shapes: tuple[tuple[int, ...], ...]) -> None:
    base = BY_NAME["indefinite"]
    case = Case("split", base.matrix, base.right, shapes, INDEFINITE)
    solution, _ = solve_case(MINRES(5, rtol=None), case)
    reference, _ = solve_case(MINRES(5, rtol=None), base)
    torch.testing.assert_close(joined(solution.value), joined(reference.value), rtol=1e-11, atol=1e-13)


def test_an_inexact_operator_has_its_residual_measured() -> None:
    case = BY_NAME["indefinite"]
    drifts = iter(1e-5 * with_spectrum([1.0] * 4 + [-1.0] * 4, seed=seed) for seed in range(200))

    def product(v: Params) -> Params:
        return case.split((case.matrix + next(drifts)) @ joined(v))

    operator = Counting(product, exact=False)
    solution = MINRES(40, rtol=1e-9).solve(operator, case.b)
    assert solution.status is Status.NOT_CONVERGED
    assert 1e-7 < solution.residual_norms[1] < 1e-2
    assert solution.num_hvps == len(operator.asked)


def test_an_operator_that_is_not_symmetric_does_not_diverge_silently() -> None:
    matrix = torch.tensor([[0.1, 1.0], [-1.0, 0.1]], dtype=torch.float64)
    operator = Counting(lambda v: {"y": matrix @ v["y"]}, exact=False)
    b = {"y": vector(2)}
    solution = MINRES(6, rtol=1e-6).solve(operator, b)
    true = float((b["y"] - matrix @ solution.value["y"]).norm() / b["y"].norm())
    assert solution.residual_norms[1] == pytest.approx(true, rel=1e-9)
    assert not solution.status.ok
    assert float(solution.value["y"].norm()) > 0.0


def test_an_operator_that_breaks_half_way_keeps_the_last_finite_iterate() -> None:
    case = BY_NAME["well-conditioned"]
    calls = 0

    def product(v: Params) -> Params:
        nonlocal calls
        calls += 1
        return case.split(case.matrix @ joined(v) * (math.inf if calls == 5 else 1.0))

    solution = MINRES(30, rtol=1e-9).solve(product, case.b)
    assert (solution.status, solution.iterations) == (Status.NON_FINITE, 4)
    assert solution.residual_norms[1] == pytest.approx(case.relative_residual(solution.value), rel=1e-6)
    assert 0.0 < solution.residual_norms[1] < 1.0


def test_zero_gives_zero_and_leaves_of_different_dtypes_are_kept() -> None:
    matrix = BY_NAME["indefinite"].matrix
    b: Params = {"single": vector(5).float(), "double": vector(3, seed=2)}

    def product(v: Params) -> Params:
        y = matrix @ torch.cat([v["single"].double(), v["double"]])
        return {"single": y[:5].float(), "double": y[5:]}

    solution = MINRES(30, rtol=1e-4).solve(product, b)
    assert solution.status is Status.CONVERGED
    assert [leaf.dtype for leaf in solution.value.values()] == [torch.float32, torch.float64]
    exact = torch.linalg.solve(matrix, torch.cat([b["single"].double(), b["double"]]))
    torch.testing.assert_close(joined(solution.value).double(), exact, rtol=0.0, atol=5e-4)
    nothing = MINRES().solve(product, {name: torch.zeros_like(leaf) for name, leaf in b.items()})
    assert (nothing.status, nothing.num_hvps) == (Status.CONVERGED, 0)


def test_on_definite_systems_the_residual_is_never_above_that_of_cg() -> None:
    for name in ("well-conditioned", "ill-conditioned"):
        ours, _ = solve_case(MINRES(6, rtol=None), BY_NAME[name])
        theirs, _ = solve_case(CG(6, rtol=None), BY_NAME[name])
        pairs = zip(ours.residual_curve, theirs.residual_curve, strict=True)
        assert all(mine <= other * (1.0 + 1e-9) for mine, other in pairs)


@pytest.mark.parametrize(
    ("options", "match"), [({"max_iterations": 0}, "MINRES: max_iterations"), ({"rtol": 1.0}, "MINRES: rtol")]
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MINRES(**options)
