"""Operators that are not symmetric: who solves them, who refuses them, and GMRES and the adjoint iteration anywhere."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bilevel import CG, MINRES, Identity, Neumann, Params, Status
from bilevel.linear import (
    GMRES,
    AdjointIteration,
    Dense,
    Diagonal,
    Escalating,
    FunctionOperator,
    MeanOperator,
    Nystrom,
    ScaledOperator,
    Solver,
    SumOperator,
    TikhonovOperator,
    WatchedOperator,
)
from tests.support.cases import BY_NAME, CASES, CONSISTENT, DEFINITE, INCONSISTENT, INDEFINITE, NON_FINITE, Case
from tests.support.kinds.operators import joined, matrix, operator, right, split
from tests.support.solver_checks import check_honest, relative_error, solve_case

NEED_SYMMETRIC: list[Solver] = [
    *(CG(), CG(layerwise=True), CG(recycle=3), CG(preconditioner=Diagonal()), Neumann(), Neumann(scale=0.1)),
    *(MINRES(), Nystrom(), Escalating(CG()), Escalating(GMRES())),
]


@pytest.mark.parametrize("solver", NEED_SYMMETRIC, ids=repr)
def test_solvers_that_rest_on_symmetry_refuse_and_name_those_that_serve(solver: Solver) -> None:
    with pytest.raises(ValueError, match=rf"{type(solver).__name__} needs a symmetric.*GMRES.*AdjointIteration.*Dense"):
        solver.solve(operator(matrix(0, 0.5)), split(right(0)))


@pytest.mark.parametrize(
    "combined",
    [
        lambda a, s: MeanOperator([s, a]),
        lambda a, s: SumOperator(s, a),
        lambda a, s: ScaledOperator(2.0, a),
        lambda a, s: TikhonovOperator(a, 1.0),
        lambda a, s: WatchedOperator(a, lambda: None),
    ],
)
def test_operators_made_of_others_are_symmetric_where_all_of_these_are(
    combined: Callable[..., FunctionOperator],
) -> None:
    symmetric = FunctionOperator(lambda v: v)
    assert combined(symmetric, symmetric).symmetric
    assert not combined(operator(matrix(0, 0.5)), symmetric).symmetric


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("solver", "radius"),
    [
        *((GMRES(7, rtol=1e-12), radius) for radius in (0.3, 0.9, 3.0)),
        *((Dense(), radius) for radius in (0.3, 0.9, 3.0)),
        # Short cycles need a field of values away from 0.
        (GMRES(60, restart=4, rtol=1e-12), 0.3),
    ],
    ids=repr,
)
def test_against_dense_algebra(solver: Solver, radius: float, seed: int) -> None:
    a, b = matrix(seed, radius), right(seed)
    found = solver.solve(operator(a), split(b))
    exact = torch.linalg.solve(a, b)
    assert found.status is Status.CONVERGED
    assert float((joined(found.value) - exact).norm()) <= 1e-9 * float(exact.norm())
    true = float((b - a @ joined(found.value)).norm() / b.norm())
    assert found.residual_norms == (1.0, pytest.approx(true, abs=1e-13))
    assert found.min_curvature is None
    assert found.ritz_range is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gmres_in_either_precision(dtype: torch.dtype) -> None:
    a, b = matrix(1, 0.9), right(1)
    found = GMRES(20, rtol=1e-5).solve(operator(a), split(b.to(dtype)))
    assert found.status is Status.CONVERGED
    assert joined(found.value).dtype == dtype
    assert float((joined(found.value).double() - torch.linalg.solve(a, b)).norm()) <= 1e-3


def test_the_residual_of_gmres_is_the_least_over_the_krylov_space() -> None:
    a, b = matrix(2, 0.9), right(2)
    powers = [b]
    for count in range(1, 6):
        space = torch.stack(powers, dim=1)
        least = torch.linalg.vector_norm(b - a @ space @ torch.linalg.lstsq(a @ space, b).solution) / b.norm()
        found = GMRES(count, rtol=None).solve(operator(a), split(b))
        assert found.status is Status.BUDGET
        assert found.iterations == count
        assert found.num_hvps == count + 1
        assert found.residual_norms[1] == pytest.approx(float(least), rel=1e-8)
        assert found.residual_curve[-1] == pytest.approx(float(least), rel=1e-8)
        powers.append(a @ powers[-1])


def test_a_rotation_stalls_short_cycles_and_is_solved_by_a_whole_one() -> None:
    shift = torch.eye(7, dtype=torch.float64).roll(1, 0)
    b = torch.eye(7, dtype=torch.float64)[0]
    assert GMRES(7, rtol=1e-10).solve(operator(shift), split(b)).status is Status.CONVERGED
    short = GMRES(40, restart=3, rtol=1e-10).solve(operator(shift), split(b))
    assert short.status is Status.NOT_CONVERGED
    assert torch.equal(joined(short.value), b), "never 0, which would silence the term"


def test_starts_serve_and_the_solution_as_start_makes_no_iteration() -> None:
    a, b = matrix(3, 0.9), right(3)
    exact = split(torch.linalg.solve(a, b))
    for solver in (GMRES(20, rtol=1e-8), AdjointIteration(300, rtol=1e-8)):
        found = solver.solve(operator(a), split(b), x0=exact)
        assert found.status is Status.CONVERGED
        assert found.iterations == 0
        assert found.num_hvps == 1
        near = {name: 1.001 * leaf for name, leaf in exact.items()}
        ahead, behind = solver.solve(operator(a), split(b), x0=near), solver.solve(operator(a), split(b))
        assert ahead.residual_norms[0] == pytest.approx(1e-3, rel=1e-6)
        assert behind.residual_norms[0] == 1.0
        assert ahead.residual_curve[0] < 0.1 * behind.residual_curve[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gmres_on_every_symmetric_case(case: Case) -> None:
    solution, counted = solve_case(GMRES(60, rtol=1e-9), case)
    check_honest(case, counted, solution, 1e-9)
    expected = {
        DEFINITE: Status.CONVERGED,
        INDEFINITE: Status.CONVERGED,
        CONSISTENT: Status.CONVERGED,
        INCONSISTENT: Status.INCONSISTENT,
        NON_FINITE: Status.NON_FINITE,
    }[case.kind]
    assert solution.status is expected
    if solution.status is Status.CONVERGED:
        assert relative_error(case, solution) <= (1e-2 if case.name == "ill-conditioned" else 1e-7)


def test_the_adjoint_iteration_makes_the_partial_sums_of_the_series() -> None:
    a, b = matrix(4, 0.7), right(4)
    m, total, term = torch.eye(7, dtype=torch.float64) - a, torch.zeros(7, dtype=torch.float64), b
    for count in range(1, 5):
        total, term = total + term, m @ term
        found = AdjointIteration(count, rtol=None).solve(operator(a), split(b))
        assert torch.allclose(joined(found.value), total, rtol=1e-12)
        assert found.num_hvps == found.iterations == count
        assert found.residual_norms[1] == pytest.approx(float(term.norm() / b.norm()), rel=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_the_adjoint_iteration_converges_where_the_map_contracts_and_diverges_elsewhere(seed: int) -> None:
    a, b = matrix(seed, 0.8), right(seed)
    found = AdjointIteration(400, rtol=1e-10).solve(operator(a), split(b))
    assert found.status is Status.CONVERGED
    assert torch.allclose(joined(found.value), torch.linalg.solve(a, b), rtol=1e-8)
    beyond = AdjointIteration(400, rtol=1e-10).solve(operator(matrix(seed, 1.3)), split(b))
    assert beyond.status is Status.DIVERGED
    assert all(bool(leaf.isfinite().all()) for leaf in beyond.value.values())


def test_transient_growth_is_not_taken_for_divergence() -> None:
    m = torch.zeros(7, 7, dtype=torch.float64)
    m[range(6), range(1, 7)] = 10.0
    a, b = torch.eye(7, dtype=torch.float64) - m, torch.ones(7, dtype=torch.float64)
    found = AdjointIteration(20, rtol=1e-10).solve(operator(a), split(b))
    assert found.status is Status.CONVERGED
    assert max(found.residual_curve) > 1e3
    assert torch.allclose(joined(found.value), torch.linalg.solve(a, b), rtol=1e-10)


@pytest.mark.parametrize("solver", [GMRES(10), AdjointIteration(10), Dense()], ids=repr)
@pytest.mark.parametrize("late", [0, 2])
def test_products_that_are_not_finite_leave_the_right_hand_side_or_the_best_iterate(solver: Solver, late: int) -> None:
    made, a = [0], matrix(0, 0.9)

    def product(x: Params) -> Params:
        made[0] += 1
        return split(a @ joined(x) * (math.nan if made[0] > late else 1.0))

    found = solver.solve(FunctionOperator(product, symmetric=False), split(right(0)))
    assert found.status is Status.NON_FINITE
    assert all(bool(leaf.isfinite().all()) for leaf in found.value.values())
    assert joined(found.value).norm() > 0.0


def test_a_singular_system_by_dense_has_the_solution_of_least_norm() -> None:
    a = matrix(5, 0.9) @ torch.diag(torch.tensor([1.0, 1, 1, 1, 1, 1, 0], dtype=torch.float64))
    inside = a @ right(5)
    found = Dense().solve(operator(a), split(inside))
    assert found.status is Status.CONVERGED
    assert torch.allclose(joined(found.value), torch.linalg.pinv(a) @ inside, rtol=1e-8)
    beside = inside + torch.linalg.svd(a)[0][:, -1]
    assert Dense().solve(operator(a), split(beside)).status is Status.INCONSISTENT
    assert GMRES(30, rtol=1e-9).solve(operator(a), split(beside)).status is not Status.CONVERGED


def test_dense_on_a_symmetric_operator_is_as_it_was_and_serves_several_right_hand_sides() -> None:
    case, a = BY_NAME["well-conditioned"], matrix(6, 3.0)
    assert solve_case(Dense(), case)[0].ritz_range is not None
    made = [0]

    def product(x: Params) -> Params:
        made[0] += 1
        return split(a @ joined(x))

    counted = FunctionOperator(product, symmetric=False)
    state = Dense().prepare(counted)
    for seed in range(3):
        found = Dense().solve(counted, split(right(seed)), state=state)
        assert torch.allclose(joined(found.value), torch.linalg.solve(a, right(seed)), rtol=1e-9)
    assert made[0] == 7 + 3


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: GMRES(0), "GMRES: max_iterations"),
        (lambda: GMRES(5, restart=0), "GMRES: restart"),
        (lambda: GMRES(5, rtol=1.0), "GMRES: rtol"),
        (lambda: AdjointIteration(0), "AdjointIteration: max_iterations"),
        (lambda: AdjointIteration(rtol=-1.0), "AdjointIteration: rtol"),
    ],
)
def test_options_out_of_range(make: Callable[[], Solver], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        make()


def test_identity_and_zero_right_hand_sides_need_no_symmetry() -> None:
    zero: Tensor = torch.zeros(7, dtype=torch.float64)
    assert Identity().solve(operator(matrix(0, 0.5)), split(right(0))).status is Status.BUDGET
    for solver in (GMRES(), AdjointIteration(), Dense()):
        found = solver.solve(operator(matrix(0, 0.5)), split(zero))
        assert found.status is Status.CONVERGED
        assert found.num_hvps == 0
        assert not joined(found.value).any()
