"""Nystrom's low-rank solver and its sketch against dense algebra."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import CG, Params, Status
from bilevel.linear.sketch import Sketch, draw_sketch
from bilevel.linear.solvers.nystrom import Nystrom
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


def shifted_low_rank(rank: int, n: int = 30, *, signs: bool = False, weight: float = 10.0, rho: float = 1.0) -> Case:
    """rho I + H / weight with H of that rank, of both signs if asked for."""
    values = [3.0 + k for k in range(rank)]
    values = [-value / 4 if signs and k % 3 == 2 else value for k, value in enumerate(values)]
    matrix = with_spectrum([rho + value / weight for value in values] + [rho] * (n - rank))
    return Case("shifted low rank", matrix, vector(n), ((4, 5), (), (n - 21,)), DEFINITE)


def sketch_of(case: Case, rank: int, tikhonov: float | None) -> Sketch:
    sketch = draw_sketch(dense(case.matrix, case.split), case.b, rank, tikhonov, seed=0)
    assert sketch is not None
    return sketch


def textbook(case: Case, sample: Tensor, tikhonov: float) -> Tensor:
    """The model as a matrix, by pseudo-inverse."""
    low_rank = case.matrix - tikhonov * torch.eye(len(case.right), dtype=torch.float64)
    image = low_rank @ sample
    core = torch.linalg.pinv(sample.T @ image, hermitian=True, rtol=1e-12)
    return tikhonov * torch.eye(len(case.right), dtype=torch.float64) + image @ core @ image.T


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_sketch_of_everything_solves_directly(case: Case) -> None:
    solution, operator = solve_case(Nystrom(rank=20, rtol=1e-9), case)
    check_honest(case, operator, solution, rtol=1e-9)
    if case.kind in (DEFINITE, INDEFINITE, CONSISTENT):
        assert (solution.status, solution.iterations) == (Status.CONVERGED, 1)
        assert solution.num_hvps == len(case.right) + 1
        assert relative_error(case, solution) <= (1e-8 if case.name == "ill-conditioned" else 1e-12)
        values = torch.linalg.eigvalsh(case.matrix)
        assert solution.ritz_range == pytest.approx((float(values[0]), float(values[-1])), rel=1e-8, abs=1e-14)
    elif case.kind == INCONSISTENT:
        assert solution.status is Status.INCONSISTENT
        if case.name != "zero operator":
            torch.testing.assert_close(joined(solution.value), case.solution())


@pytest.mark.parametrize("tikhonov", [None, 1.0])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_small_sketch_is_refined(case: Case, tikhonov: float | None) -> None:
    solution, operator = solve_case(Nystrom(rank=3, tikhonov=tikhonov, max_refinements=40, rtol=1e-9), case)
    check_honest(case, operator, solution, rtol=1e-9)
    if case.kind in (DEFINITE, CONSISTENT):
        assert solution.status is Status.CONVERGED
        assert len(solution.residual_curve) == solution.iterations
    elif case.kind in (INDEFINITE, INCONSISTENT):
        expected = Status.INCONSISTENT if case.kind == INCONSISTENT else Status.NEGATIVE_CURVATURE
        assert solution.status is expected


@pytest.mark.parametrize("refinements", [0, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_a_tolerance_what_comes_back_is_still_honest(case: Case, refinements: int) -> None:
    solution, operator = solve_case(Nystrom(rank=3, rtol=None, max_refinements=refinements), case)
    check_honest(case, operator, solution, rtol=1e-9)
    if case.kind == DEFINITE and solution.status is not Status.CONVERGED:
        assert solution.status in (Status.BUDGET, Status.DIVERGED)
        assert solution.iterations == 1 + refinements


@pytest.mark.parametrize("case", [c for c in CASES if in_single_precision(c) and c.name != "ill-conditioned"], ids=str)
def test_single_precision(case: Case) -> None:
    for solver in (Nystrom(rank=20, rtol=1e-4), Nystrom(rank=4, max_refinements=40, rtol=1e-4)):
        solution, operator = solve_case(solver, case, torch.float32)
        check_honest(case, operator, solution, rtol=1e-4, error=1.2e-7)
        if case.kind == DEFINITE:
            assert solution.status is Status.CONVERGED
            assert relative_error(case, solution) <= 1e-3
        elif case.kind == INCONSISTENT:
            assert solution.status is Status.INCONSISTENT


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_exact_at_the_rank_of_what_is_added_to_the_identity(rank: int) -> None:
    case = shifted_low_rank(rank)
    solution, operator = solve_case(Nystrom(rank=rank, tikhonov=1.0, max_refinements=0, rtol=1e-10), case)
    assert (solution.status, solution.num_hvps) == (Status.CONVERGED, rank + 1)
    assert relative_error(case, solution) < 1e-11
    check_honest(case, operator, solution, rtol=1e-10)
    # An estimated tikhonov needs one direction more, which sees the identity alone.
    estimated, _ = solve_case(Nystrom(rank=rank + 1, max_refinements=0, rtol=1e-10), case)
    assert estimated.status is Status.CONVERGED
    assert relative_error(case, estimated) < 1e-10
    assert estimated.ritz_range is not None
    assert estimated.ritz_range[0] == pytest.approx(1.0, rel=1e-10)
    # One direction less is not enough.
    short, _ = solve_case(Nystrom(rank=rank, max_refinements=0, rtol=1e-10), case)
    assert short.status is not Status.CONVERGED


def test_exact_on_both_signs_with_a_known_shift_and_half_as_many_directions_again() -> None:
    case = shifted_low_rank(8, signs=True)
    assert float(torch.linalg.eigvalsh(case.matrix)[0]) < 1.0
    solution, _ = solve_case(Nystrom(rank=12, tikhonov=1.0, max_refinements=0, rtol=1e-9), case)
    assert solution.status is Status.CONVERGED
    assert relative_error(case, solution) < 1e-9


def test_an_indefinite_system_is_solved_where_the_sketch_holds_it() -> None:
    case = shifted_low_rank(8, signs=True, weight=1.0)
    assert float(torch.linalg.eigvalsh(case.matrix)[0]) < -0.9
    solution, _ = solve_case(Nystrom(rank=12, tikhonov=1.0, rtol=1e-9), case)
    assert (solution.status, solution.iterations) == (Status.CONVERGED, 1)
    assert relative_error(case, solution) < 1e-9
    poor, operator = solve_case(Nystrom(rank=20, rtol=1e-9), case)
    assert poor.status is Status.NEGATIVE_CURVATURE
    assert poor.min_curvature is not None
    assert poor.min_curvature < 0.0
    # Known from the sketch: no iteration is spent on it.
    assert poor.iterations == 1
    assert poor.num_hvps <= 20 + 2
    assert poor.min_curvature == pytest.approx(sketch_of(case, 20, None).ritz_range[0])
    check_honest(case, operator, poor, rtol=1e-9)


def test_the_identity_needs_nothing_but_its_shift() -> None:
    case = Case("twice the identity", 2.0 * torch.eye(8, dtype=torch.float64), vector(8), ((2, 2), (), (3,)), DEFINITE)
    for solver in (Nystrom(rank=3), Nystrom(rank=3, tikhonov=2.0)):
        solution, _ = solve_case(solver, case)
        assert (solution.status, solution.num_hvps) == (Status.CONVERGED, 4)
        torch.testing.assert_close(joined(solution.value), 0.5 * case.right)


@pytest.mark.parametrize("tikhonov", [0.6, None])
def test_the_model_is_the_published_formula(tikhonov: float | None) -> None:
    case = Case("definite", with_spectrum([0.8 + 0.1 * k**1.5 for k in range(20)]), vector(20), ((20,),), DEFINITE)
    operator = dense(case.matrix, case.split)
    sketch = draw_sketch(operator, case.b, 6, tikhonov, seed=0)
    assert sketch is not None
    sample = torch.stack(operator.asked, dim=1)
    torch.testing.assert_close(sample.T @ sample, torch.eye(6, dtype=torch.float64))
    compression = torch.linalg.eigvalsh(sample.T @ case.matrix @ sample)
    assert sketch.ritz_range == pytest.approx((float(compression[0]), float(compression[-1])))
    model = textbook(case, sample, float(compression[0]) if tikhonov is None else tikhonov)
    torch.testing.assert_close(
        joined(sketch.solve(case.b)), torch.linalg.solve(model, case.right), rtol=1e-8, atol=1e-10
    )
    torch.testing.assert_close(sketch.precondition(case.b), sketch.solve(case.b))


def test_a_core_of_both_signs_is_cut_where_its_inverse_would_be_wrong() -> None:
    # Eigenvalues as in BiSSL at weak damping: a decaying positive part and a smaller negative one.
    k = torch.arange(1, 201, dtype=torch.float64)
    values = torch.cat([20.0 / k[:100] ** 1.5, -0.13 * torch.exp(-k[:100] / 20)])
    matrix = with_spectrum((1.0 + values).tolist(), seed=5)
    case = Case("decaying", matrix, vector(200), ((200,),), DEFINITE)
    for rank in (20, 40, 60):
        sketch = sketch_of(case, rank, 1.0)
        eigenvalues = 1.0 / torch.cat([sketch.inverse, torch.tensor([sketch.rest])])
        assert float(eigenvalues.min()) > 0.2
        assert float(eigenvalues.max()) < 25.0
        basis = torch.eye(200, dtype=torch.float64).unbind()
        inverse = torch.stack([joined(sketch.precondition({"leaf0": e})) for e in basis])
        assert float(torch.linalg.eigvalsh(0.5 * (inverse + inverse.T))[0]) > 0.0


def test_products_are_made_once_and_serve_every_right_hand_side() -> None:
    case = shifted_low_rank(5)
    names = list(case.b)

    def product(v: Params) -> Params:
        y = case.split(case.matrix @ joined({name: v[name] for name in names}))
        return {name: y[name] for name in v}

    operator, solver = Counting(product), Nystrom(rank=5, tikhonov=1.0, rtol=1e-9)
    state = solver.prepare(operator)
    assert not operator.asked
    first = solver.solve(operator, case.b, state=state)
    right = vector(30, seed=8)
    reordered = {name: case.split(right)[name] for name in reversed(names)}
    second = solver.solve(operator, reordered, state=state)
    assert (first.num_hvps, second.num_hvps, len(operator.asked)) == (6, 1, 7)
    assert list(second.value) == list(reordered)
    exact = torch.linalg.solve(case.matrix, right)
    torch.testing.assert_close(joined({name: second.value[name] for name in names}), exact)


def test_refinement_is_conjugate_gradients_from_the_model_and_stops_on_the_residual() -> None:
    values = [1.0 + 0.01 * (k % 9) for k in range(60)]
    values[:8] = [80.0, 60.0, 40.0, 20.0, 9.0, 5.0, 3.0, 2.0]
    case = Case("outliers", with_spectrum(values), vector(60), ((60,),), DEFINITE)
    direct, _ = solve_case(Nystrom(rank=12, max_refinements=0), case)
    refined, _ = solve_case(Nystrom(rank=12, max_refinements=20, rtol=1e-8), case)
    assert refined.status is Status.CONVERGED
    assert refined.residual_curve[0] == pytest.approx(direct.residual_norms[1], rel=1e-9)
    assert refined.residual_norms[0] == 1.0
    plain, _ = solve_case(CG(60, rtol=1e-8), case)
    assert refined.iterations < plain.iterations
    short, _ = solve_case(Nystrom(rank=12, max_refinements=1, rtol=1e-12), case)
    assert (short.status, short.iterations) == (Status.NOT_CONVERGED, 2)


def test_a_start_is_refined_from_its_residual() -> None:
    case = shifted_low_rank(5)
    near = case.split(torch.linalg.solve(case.matrix, case.right) + 1e-2 * vector(30, seed=4))
    operator = dense(case.matrix, case.split)
    solution = Nystrom(rank=3, max_refinements=0, rtol=None).solve(operator, case.b, x0=near)
    assert solution.residual_norms[0] == pytest.approx(case.relative_residual(near), rel=1e-9)
    assert solution.residual_norms[1] == pytest.approx(case.relative_residual(solution.value), rel=1e-9)
    assert solution.residual_norms[1] < solution.residual_norms[0]
    assert solution.num_hvps == len(operator.asked) == 5
    poor = Nystrom(rank=3, max_refinements=0).solve(dense(-case.matrix, case.split), case.b, x0=near)
    assert not poor.status.ok
    assert float(joined(poor.value).norm()) > 0.0


def test_a_model_that_makes_things_worse_is_not_kept() -> None:
    case = BY_NAME["indefinite"]
    solution, operator = solve_case(Nystrom(rank=4, max_refinements=0, rtol=None), case)
    check_honest(case, operator, solution, rtol=1e-9)
    assert solution.status is Status.DIVERGED
    assert torch.equal(joined(solution.value), case.right)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 2.0**-100), (torch.float64, 2.0**900)])
def test_scale_equivariance_to_the_bit(dtype: torch.dtype, factor: float) -> None:
    case = BY_NAME["well-conditioned"]
    matrix = case.matrix.to(dtype)
    one, other = (
        Nystrom(rank=3).solve(dense(matrix, case.split), case.split(case.right.to(dtype) * f)) for f in (1.0, factor)
    )
    assert torch.equal(joined(other.value), joined(one.value) * factor)
    assert (one.status, one.residual_norms) == (other.status, other.residual_norms)


def test_the_split_into_leaves_does_not_matter_and_the_seed_does() -> None:
    base = BY_NAME["well-conditioned"]
    solver = Nystrom(rank=3, max_refinements=0, rtol=None)
    values = [
        joined(solve_case(solver, Case("", base.matrix, base.right, shapes, DEFINITE))[0].value)
        for shapes in (((8,),), ((2, 2), (), (3,)), ((), (1, 7)))
    ]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=1e-11, atol=1e-13)
    again, _ = solve_case(solver, base)
    assert torch.equal(joined(again.value), joined(solve_case(solver, base)[0].value))
    other, _ = solve_case(Nystrom(rank=3, max_refinements=0, rtol=None, seed=1), base)
    assert not torch.allclose(joined(other.value), values[0])


def test_leaves_of_different_dtypes() -> None:
    matrix = BY_NAME["well-conditioned"].matrix
    b: Params = {"single": vector(5).float(), "double": vector(3, seed=2)}

    def product(v: Params) -> Params:
        y = matrix @ torch.cat([v["single"].double(), v["double"]])
        return {"single": y[:5].float(), "double": y[5:]}

    solution = Nystrom(rank=8, rtol=1e-4).solve(product, b)
    assert solution.status is Status.CONVERGED
    assert [leaf.dtype for leaf in solution.value.values()] == [torch.float32, torch.float64]
    exact = torch.linalg.solve(matrix, torch.cat([b["single"].double(), b["double"]]))
    torch.testing.assert_close(joined(solution.value).double(), exact, rtol=0.0, atol=1e-4)


def test_non_finite_products_are_reported_and_not_kept() -> None:
    case = BY_NAME["well-conditioned"]
    bad = {2}

    def product(v: Params) -> Params:
        return case.split(case.matrix @ joined(v) * (math.nan if len(operator.asked) in bad else 1.0))

    operator, solver = Counting(product), Nystrom(rank=4, max_refinements=20)
    state = solver.prepare(operator)
    for last in (4, 9):
        solution = solver.solve(operator, case.b, state=state)
        assert solution.status is Status.NON_FINITE
        assert torch.equal(joined(solution.value), case.right)
        assert len(operator.asked) == last
        bad = {9}
    assert solver.solve(operator, case.b, state=state).status is Status.CONVERGED


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "Nystrom: rank"),
        ({"rank": 2.0}, "Nystrom: rank"),
        ({"tikhonov": 0.0}, "Nystrom: tikhonov"),
        ({"tikhonov": -1.0}, "Nystrom: tikhonov"),
        ({"max_refinements": -1}, "Nystrom: max_refinements"),
        ({"rtol": 1.0}, "Nystrom: rtol"),
        ({"seed": -1}, "Nystrom: seed"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Nystrom(**options)
