"""Preconditioned conjugate gradients against textbook iterations and dense algebra."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import CG, Params, Status
from bilevel.linear import LinearOperator
from bilevel.linear.preconditioner import Diagonal, Inverse, NystromPreconditioner, Preconditioner
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

PRECONDITIONERS = {
    "diagonal": Diagonal(probes=4),
    "nystrom": NystromPreconditioner(rank=4),
    "nystrom, known tikhonov": NystromPreconditioner(rank=4, tikhonov=0.5),
    "nystrom of everything": NystromPreconditioner(rank=50),
}


class Given(Preconditioner):
    """A preconditioner that is handed in as a matrix M^-1."""

    def __init__(self, inverse: Tensor, case: Case, products: int = 0) -> None:
        self.inverse, self.case, self.products = inverse, case, products

    def prepare(self, operator: LinearOperator, like: Params) -> Inverse | None:
        for _ in range(self.products):
            operator(like)
        return lambda r: self.case.split(self.inverse @ joined(r))


def textbook(matrix: Tensor, inverse: Tensor, b: Tensor, steps: int) -> Tensor:
    """Preconditioned iterations as in the books, in one vector."""
    x, r = torch.zeros_like(b), b.clone()
    z = inverse @ r
    d = z.clone()
    for _ in range(steps):
        alpha = (r @ z) / (d @ matrix @ d)
        x = x + alpha * d
        new_r = r - alpha * (matrix @ d)
        new_z = inverse @ new_r
        d = new_z + (new_r @ new_z) / (r @ z) * d
        r, z = new_r, new_z
    return x


@pytest.mark.parametrize("name", PRECONDITIONERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_right_answer_or_right_status(case: Case, name: str) -> None:
    solution, operator = solve_case(CG(60, rtol=1e-9, preconditioner=PRECONDITIONERS[name]), case)
    check_honest(case, operator, solution, rtol=1e-9)
    assert solution.ritz_range is None
    if case.kind in (DEFINITE, CONSISTENT):
        assert solution.status is Status.CONVERGED
    elif case.kind in (INCONSISTENT, INDEFINITE):
        expected = Status.INCONSISTENT if case.kind == INCONSISTENT else Status.NEGATIVE_CURVATURE
        assert solution.status is expected
    if case.kind == DEFINITE:
        assert relative_error(case, solution) <= (1e-3 if case.name == "ill-conditioned" else 1e-8)


@pytest.mark.parametrize("name", PRECONDITIONERS)
@pytest.mark.parametrize("case", [c for c in CASES if in_single_precision(c) and c.name != "ill-conditioned"], ids=str)
def test_single_precision(case: Case, name: str) -> None:
    solution, operator = solve_case(CG(60, rtol=1e-4, preconditioner=PRECONDITIONERS[name]), case, torch.float32)
    check_honest(case, operator, solution, rtol=1e-4, error=1.2e-7)
    if case.kind == DEFINITE:
        assert solution.status is Status.CONVERGED
        assert relative_error(case, solution) <= 1e-3
    elif case.kind in (INCONSISTENT, INDEFINITE):
        assert not solution.status.ok


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_iterates_are_the_textbooks(steps: int) -> None:
    case = BY_NAME["well-conditioned"]
    inverse = with_spectrum([0.3, 0.5, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0], seed=9)
    solution, operator = solve_case(CG(steps, rtol=None, preconditioner=Given(inverse, case)), case)
    torch.testing.assert_close(joined(solution.value), textbook(case.matrix, inverse, case.right, steps))
    assert (solution.status, solution.iterations, solution.num_hvps) == (Status.BUDGET, steps, steps)
    quotients = [float(d @ case.matrix @ d / (d @ d)) for d in operator.asked]
    assert solution.min_curvature == pytest.approx(min(quotients), rel=1e-10)


def test_the_identity_as_preconditioner_changes_nothing() -> None:
    case = BY_NAME["ill-conditioned"]
    eye = torch.eye(8, dtype=torch.float64)
    for rtol in (None, 1e-6):
        plain, _ = solve_case(CG(7, rtol=rtol), case)
        with_eye, _ = solve_case(CG(7, rtol=rtol, preconditioner=Given(eye, case)), case)
        torch.testing.assert_close(with_eye.value, plain.value, rtol=1e-8, atol=1e-10)
        assert with_eye.num_hvps == plain.num_hvps


def test_the_exact_inverse_takes_one_iteration_and_the_residual_is_the_plain_one() -> None:
    case = BY_NAME["ill-conditioned"]
    solution, operator = solve_case(CG(9, 1e-6, preconditioner=Given(torch.linalg.inv(case.matrix), case)), case)
    assert (solution.status, solution.iterations) == (Status.CONVERGED, 1)
    check_honest(case, operator, solution, rtol=1e-6)


def test_stopping_goes_by_the_residual_and_not_by_the_preconditioned_one() -> None:
    # M^-1 r is small long before r is: the preconditioner hides the large part.
    case = BY_NAME["well-conditioned"]
    weights = torch.diag(torch.tensor([1e-3] * 4 + [1.0] * 4, dtype=torch.float64))
    solution, _ = solve_case(CG(60, rtol=1e-8, preconditioner=Given(weights, case)), case)
    assert solution.status is Status.CONVERGED
    assert case.relative_residual(solution.value) <= 1e-8


def test_the_state_keeps_the_preconditioner_and_counts_its_products_once() -> None:
    case = BY_NAME["well-conditioned"]
    for preconditioner, price in ((Diagonal(probes=5), 5), (NystromPreconditioner(rank=3), 3)):
        operator, solver = dense(case.matrix, case.split), CG(3, rtol=None, preconditioner=preconditioner)
        state = solver.prepare(operator)
        assert not operator.asked
        first = solver.solve(operator, case.b, state=state)
        second = solver.solve(operator, case.split(vector(8, seed=5)), state=state)
        assert (first.num_hvps, second.num_hvps) == (price + 3, 3)
        assert len(operator.asked) == price + 6
    own = CG(2, rtol=None, preconditioner=Given(torch.eye(8, dtype=torch.float64), case, products=2))
    assert solve_case(own, case)[0].num_hvps == 4


def test_diagonal_is_exact_where_the_operator_is_diagonal() -> None:
    diagonal = torch.logspace(-6, 0, 8, dtype=torch.float64)
    case = Case("diagonal", torch.diag(diagonal), vector(8), ((2, 2), (), (3,)), DEFINITE)
    solution, _ = solve_case(CG(20, rtol=1e-9, preconditioner=Diagonal(probes=2)), case)
    assert (solution.status, solution.iterations, solution.num_hvps) == (Status.CONVERGED, 1, 4)
    torch.testing.assert_close(joined(solution.value), case.right / diagonal, rtol=1e-8, atol=0.0)
    inverse = Diagonal(probes=2).prepare(dense(case.matrix, case.split), case.b)
    assert inverse is not None
    torch.testing.assert_close(joined(inverse(case.b)), case.right / diagonal)


def test_diagonal_is_hutchinsons_mean_with_its_standard_error() -> None:
    case, probes = BY_NAME["well-conditioned"], 7
    operator = dense(case.matrix, case.split)
    inverse = Diagonal(probes=probes, seed=3).prepare(operator, case.b)
    assert inverse is not None
    assert all(torch.equal(z.abs(), torch.ones_like(z)) for z in operator.asked)
    samples = torch.stack([z * (case.matrix @ z) for z in operator.asked])
    size = (samples.mean(0).square() + samples.var(0, unbiased=True) / probes).sqrt()
    torch.testing.assert_close(joined(inverse(case.split(torch.ones(8, dtype=torch.float64)))), 1.0 / size)
    many = Diagonal(probes=4000).prepare(dense(case.matrix, case.split), case.b)
    assert many is not None
    estimate = 1.0 / joined(many(case.split(torch.ones(8, dtype=torch.float64))))
    torch.testing.assert_close(estimate, case.matrix.diagonal(), rtol=0.05, atol=0.0)


def test_diagonal_helps_where_scales_differ() -> None:
    scales = torch.diag(torch.logspace(-2, 1, 40, dtype=torch.float64))
    base = torch.eye(40, dtype=torch.float64) + 0.01 * with_spectrum([float(k % 5) for k in range(40)])
    case = Case("badly scaled", scales @ base @ scales, vector(40), ((40,),), DEFINITE)
    plain, _ = solve_case(CG(400, rtol=1e-6), case)
    helped, _ = solve_case(CG(400, rtol=1e-6, preconditioner=Diagonal(probes=8)), case)
    assert helped.status is Status.CONVERGED
    assert helped.num_hvps < plain.num_hvps / 2


def test_nystrom_helps_where_a_few_eigenvalues_stick_out() -> None:
    values = [1.0 + 0.02 * (k % 7) for k in range(60)]
    values[:6] = [300.0, 200.0, 90.0, 50.0, 30.0, 20.0]
    case = Case("outliers", with_spectrum(values), vector(60), ((60,),), DEFINITE)
    plain, _ = solve_case(CG(60, rtol=1e-6), case)
    helped, _ = solve_case(CG(60, rtol=1e-6, preconditioner=NystromPreconditioner(rank=12)), case)
    assert helped.status is Status.CONVERGED
    assert helped.iterations <= 6 < plain.iterations


@pytest.mark.parametrize("preconditioner", [Diagonal(), NystromPreconditioner(3)])
@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 2.0**-100), (torch.float64, 2.0**900)])
def test_scale_equivariance_to_the_bit(preconditioner: Preconditioner, dtype: torch.dtype, factor: float) -> None:
    case = BY_NAME["well-conditioned"]
    solver, matrix = CG(rtol=1e-5, preconditioner=preconditioner), case.matrix.to(dtype)
    one, other = (solver.solve(dense(matrix, case.split), case.split(case.right.to(dtype) * f)) for f in (1.0, factor))
    assert torch.equal(joined(other.value), joined(one.value) * factor)
    assert one.residual_norms == other.residual_norms


@pytest.mark.parametrize("preconditioner", [NystromPreconditioner(3), NystromPreconditioner(3, tikhonov=0.7)])
def test_the_split_into_leaves_does_not_matter(preconditioner: Preconditioner) -> None:
    base = BY_NAME["well-conditioned"]
    values = [
        joined(
            solve_case(CG(3, None, preconditioner=preconditioner), Case("", base.matrix, base.right, shapes, ""))[
                0
            ].value
        )
        for shapes in (((8,),), ((2, 2), (), (3,)), ((), (1, 7)))
    ]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=1e-11, atol=1e-13)


def test_a_start_and_an_inexact_operator() -> None:
    case = BY_NAME["well-conditioned"]
    near = case.split(torch.linalg.solve(case.matrix, case.right) + 1e-3 * vector(8, seed=4))
    solver = CG(20, rtol=1e-6, preconditioner=NystromPreconditioner(4))
    for exact in (True, False):
        operator = dense(case.matrix, case.split)
        operator.exact = exact
        solution = solver.solve(operator, case.b, x0=near)
        assert solution.status is Status.CONVERGED
        assert solution.residual_norms[0] == pytest.approx(case.relative_residual(near), rel=1e-9)
        check_honest(case, operator, solution, rtol=1e-6)


def test_a_product_that_is_not_finite_while_preparing_is_reported_and_not_kept() -> None:
    case = BY_NAME["well-conditioned"]
    broken = True

    def product(v: Params) -> Params:
        return case.split(case.matrix @ joined(v) * (math.nan if broken else 1.0))

    for preconditioner in (Diagonal(), NystromPreconditioner(3)):
        broken = True
        operator, solver = Counting(product), CG(20, preconditioner=preconditioner)
        state = solver.prepare(operator)
        solution = solver.solve(operator, case.b, state=state)
        assert solution.status is Status.NON_FINITE
        assert torch.equal(joined(solution.value), case.right)
        assert solution.num_hvps == len(operator.asked)
        broken = False
        assert solver.solve(operator, case.b, state=state).status is Status.CONVERGED


def test_a_preconditioner_that_is_not_definite_is_refused() -> None:
    case = BY_NAME["well-conditioned"]
    with pytest.raises(ValueError, match="positive definite"):
        solve_case(CG(preconditioner=Given(-torch.eye(8, dtype=torch.float64), case)), case)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: CG(layerwise=True, preconditioner=Diagonal()), ValueError, "layerwise=True takes no preconditioner"),
        (lambda: CG(preconditioner=3), TypeError, "must be a Preconditioner"),  # pyright: ignore[reportArgumentType]
        (lambda: Diagonal(probes=1), ValueError, "Diagonal: probes"),
        (lambda: Diagonal(seed=-1), ValueError, "Diagonal: seed"),
        (lambda: NystromPreconditioner(rank=0), ValueError, "NystromPreconditioner: rank"),
        (lambda: NystromPreconditioner(tikhonov=0.0), ValueError, "NystromPreconditioner: tikhonov"),
        (lambda: NystromPreconditioner(tikhonov=math.nan), ValueError, "NystromPreconditioner: tikhonov"),
    ],
)
def test_bad_options_are_refused_by_name(make: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()
