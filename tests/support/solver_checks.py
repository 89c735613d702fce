"""What must hold of any solution whatever, for the tests of single solvers."""

import math

import pytest
import torch
from torch import Tensor

from bilevel import Status
from bilevel.linear import Solution, Solver
from tests.support.cases import NON_FINITE, Case, Counting, dense, joined


def solve_case(
    solver: Solver, case: Case, dtype: torch.dtype = torch.float64, *, exact: bool = True
) -> tuple[Solution, Counting]:
    """A solution of the case and the operator that counted its products."""
    operator = dense(case.matrix.to(dtype), case.split)
    operator.exact = exact
    return solver.solve(operator, case.split(case.right.to(dtype))), operator


def check_honest(case: Case, operator: Counting, solution: Solution, rtol: float, error: float = 2.3e-16) -> None:
    """A true residual, a true count, no success that is none, nothing silenced.

    Args:
        rtol: that the solver was asked for.
        error: rounding unit of the solve.
    """
    assert solution.num_hvps == len(operator.asked)
    assert {n: t.shape for n, t in solution.value.items()} == {n: t.shape for n, t in case.b.items()}
    if case.kind == NON_FINITE:
        assert solution.status is Status.NON_FINITE
        value = joined(solution.value)
        assert torch.equal(value.nan_to_num(7.0), case.right.to(value).nan_to_num(7.0))
        return
    x = joined(solution.value).double() / case.length
    assert bool(x.isfinite().all())
    assert float(x.norm()) > 0.0, "a term was silenced"
    matrix = case.matrix + solution.tikhonov * torch.eye(len(case.right), dtype=torch.float64)
    size = 1.0 + float(torch.linalg.matrix_norm(matrix, 2) * x.norm())
    true = float((case.right / case.length - matrix @ x).norm())
    assert solution.residual_norms[1] == pytest.approx(true, rel=0.15, abs=20 * error * size)
    if solution.status is Status.CONVERGED:
        assert true <= max(1.2 * rtol, 100 * error)
    if solution.tikhonov > 0.0:
        assert solution.residual_without_tikhonov == pytest.approx(
            true_residual(case, x), rel=1e-6, abs=20 * error * size
        )
    else:
        assert solution.residual_without_tikhonov is None
    check_ritz_range(case, solution, 100 * error)


def check_ritz_range(case: Case, solution: Solution, error: float) -> None:
    """Ritz values and curvatures lie among the eigenvalues."""
    values = torch.linalg.eigvalsh(case.matrix)
    slack = error * (float(values.abs().max()) + solution.tikhonov)
    if solution.ritz_range is not None:
        low, high = solution.ritz_range
        assert float(values[0]) - slack <= low <= high <= float(values[-1]) + slack
    if solution.min_curvature is not None:
        assert float(values[0]) - slack <= solution.min_curvature <= float(values[-1]) + slack


def true_residual(case: Case, x: Tensor) -> float:
    """Of x for a right-hand side of length 1."""
    return float((case.right / case.length - case.matrix @ x).norm())


def relative_error(case: Case, solution: Solution) -> float:
    exact = torch.linalg.pinv(case.matrix, hermitian=True, rtol=1e-12) @ (case.right / case.length)
    return float((joined(solution.value).double() / case.length - exact).norm() / exact.norm())


def in_single_precision(case: Case) -> bool:
    """Whether the case's numbers fit into float32 (right-hand sides of 1e200 do not)."""
    return bool(case.right.nan_to_num().abs().max() < math.inf) and 1e-30 < case.length < 1e30
