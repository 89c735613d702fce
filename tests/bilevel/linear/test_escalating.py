"""A growing Tikhonov term after breakdowns, against the systems with it solved densely."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import CG, AlternatingSchedule, Identity, Level, Neumann, Params, Problem, Status, Trainer, linearize
from bilevel.linear import Dense, Solver
from bilevel.linear.solvers.escalating import Escalating
from bilevel.linear.solvers.minres import MINRES
from bilevel.linear.solvers.nystrom import Nystrom
from bilevel.training import JSONLWriter
from tests.support.cases import (
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
from tests.support.solver_checks import check_honest, in_single_precision, solve_case

INNER: dict[str, Solver] = {
    "cg": CG(60, rtol=1e-9),
    "neumann": Neumann(400, rtol=1e-6),
    "dense": Dense(),
    "minres": MINRES(60, rtol=1e-9),
    "nystrom": Nystrom(rank=3, max_refinements=40, rtol=1e-9),
}
NEEDS_SHIFT = {
    "cg": (INDEFINITE, INCONSISTENT),
    "neumann": (INDEFINITE, INCONSISTENT),
    "dense": (INCONSISTENT,),
    "minres": (INCONSISTENT,),
    "nystrom": (INDEFINITE, INCONSISTENT),
}


def tikhonov_solution(case: Case, tikhonov: float) -> Tensor:
    eye = torch.eye(len(case.right), dtype=torch.float64)
    return torch.linalg.solve(case.matrix + tikhonov * eye, case.right / case.length)


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_right_answer_or_right_status(case: Case, name: str) -> None:
    solution, operator = solve_case(Escalating(INNER[name]), case)
    check_honest(case, operator, solution, rtol=1e-6 if name == "neumann" else 1e-7)
    if case.kind == NON_FINITE:
        return
    assert (solution.tikhonov > 0.0) == (case.kind in NEEDS_SHIFT[name])
    slow = name == "neumann" and (case.kind == INCONSISTENT or case.name == "ill-conditioned")
    if not slow:
        assert solution.status is Status.CONVERGED
    if solution.tikhonov > 0.0 and solution.status is Status.CONVERGED:
        x = joined(solution.value) / case.length
        exact = tikhonov_solution(case, solution.tikhonov)
        torch.testing.assert_close(x, exact, rtol=1e-4, atol=1e-4 * float(exact.norm()))


@pytest.mark.parametrize("case", [c for c in CASES if in_single_precision(c)], ids=str)
def test_single_precision(case: Case) -> None:
    solution, operator = solve_case(Escalating(CG(60, rtol=1e-3)), case, torch.float32)
    check_honest(case, operator, solution, rtol=1e-3, error=1.2e-7)
    if case.kind in (INDEFINITE, INCONSISTENT):
        assert solution.status is Status.CONVERGED
        assert solution.tikhonov > 0.0


@pytest.mark.parametrize("name", [case.name for case in CASES if case.kind in (DEFINITE, CONSISTENT)])
def test_without_a_breakdown_it_is_the_inner_solver(name: str) -> None:
    case = BY_NAME[name]
    plain, _ = solve_case(CG(60, rtol=1e-9), case)
    wrapped, _ = solve_case(Escalating(CG(60, rtol=1e-9)), case)
    assert torch.equal(joined(wrapped.value), joined(plain.value))
    assert (wrapped.status, wrapped.residual_norms, wrapped.num_hvps) == (
        plain.status,
        plain.residual_norms,
        plain.num_hvps,
    )
    assert (wrapped.residual_curve, wrapped.ritz_range) == (plain.residual_curve, plain.ritz_range)
    assert (wrapped.tikhonov, wrapped.residual_without_tikhonov) == (0.0, None)


def test_the_first_term_comes_from_the_spectrum_that_was_seen() -> None:
    case = BY_NAME["indefinite"]
    broken, _ = solve_case(CG(60, rtol=1e-9), case)
    assert broken.ritz_range is not None
    assert broken.min_curvature is not None
    solution, _ = solve_case(Escalating(CG(60, rtol=1e-9)), case)
    assert solution.tikhonov == pytest.approx(-2.0 * min(broken.ritz_range[0], broken.min_curvature))
    # A singular one has no negative part: a thousandth of its size.
    singular, _ = solve_case(Escalating(CG(60, rtol=1e-9)), BY_NAME["singular, inconsistent"])
    assert singular.tikhonov == pytest.approx(4e-3, rel=1e-3)
    # Layer-wise CG knows no Ritz values: Lanczos steps of its own, counted.
    layerwise, operator = solve_case(Escalating(CG(60, layerwise=True)), BY_NAME["negative definite"])
    assert layerwise.tikhonov == pytest.approx(8.0, rel=0.05)
    assert layerwise.num_hvps == len(operator.asked)


def test_terms_grow_by_the_factor_until_one_works() -> None:
    case = BY_NAME["negative definite"]
    solution, operator = solve_case(Escalating(CG(60, rtol=1e-9), initial=0.1, factor=4.0, attempts=5), case)
    assert solution.status is Status.CONVERGED
    assert solution.tikhonov == pytest.approx(0.1 * 4.0**3)
    check_honest(case, operator, solution, rtol=1e-9)
    enough, _ = solve_case(Escalating(CG(60, rtol=1e-9), initial=0.1, factor=4.0, attempts=4), case)
    assert enough.tikhonov == solution.tikhonov


def test_where_no_term_works_the_first_breakdown_is_what_comes_back() -> None:
    case = BY_NAME["negative definite"]
    plain, once = solve_case(CG(60, rtol=1e-9), case)
    solution, operator = solve_case(Escalating(CG(60, rtol=1e-9), initial=1e-3, factor=2.0, attempts=2), case)
    assert solution.status is Status.NEGATIVE_CURVATURE
    assert (solution.tikhonov, solution.residual_without_tikhonov) == (0.0, None)
    assert torch.equal(joined(solution.value), joined(plain.value))
    assert solution.residual_norms == plain.residual_norms
    assert len(operator.asked) == solution.num_hvps == 3 * len(once.asked)


def test_the_term_that_worked_serves_later_right_hand_sides() -> None:
    case = BY_NAME["indefinite"]
    operator, solver = dense(case.matrix, case.split), Escalating(CG(60, rtol=1e-9))
    state = solver.prepare(operator)
    first = solver.solve(operator, case.b, state=state)
    before = len(operator.asked)
    right = vector(8, seed=5)
    second = solver.solve(operator, case.split(right), state=state)
    assert second.tikhonov == first.tikhonov > 0.0
    assert second.num_hvps == len(operator.asked) - before < first.num_hvps
    exact = torch.linalg.solve(case.matrix + second.tikhonov * torch.eye(8, dtype=torch.float64), right)
    torch.testing.assert_close(joined(second.value), exact, rtol=1e-6, atol=1e-6)
    with_term = case.matrix + second.tikhonov * torch.eye(8, dtype=torch.float64)
    alone = CG(60, rtol=1e-9).solve(dense(with_term, case.split), case.split(right))
    assert alone.min_curvature is not None
    assert second.min_curvature == pytest.approx(alone.min_curvature - second.tikhonov)
    # A term that stopped working grows from where it was.
    state.tikhonov, state.state = 0.01, solver.solver.prepare(operator)
    third = solver.solve(operator, case.b, state=state)
    assert third.tikhonov == pytest.approx(10.0)
    # None of the attempts worked: the next right-hand side starts where this one did.
    stubborn = Escalating(CG(60), initial=1e-6, attempts=1)
    state = stubborn.prepare(operator)
    assert not stubborn.solve(operator, case.b, state=state).status.ok
    assert state.tikhonov == 0.0


def test_numbers_other_than_the_solution_stay_those_of_the_operator() -> None:
    case = BY_NAME["negative definite"]
    solution, _ = solve_case(Escalating(CG(60, rtol=1e-9)), case)
    assert solution.ritz_range == pytest.approx((-4.0, -0.8), rel=1e-7)
    assert solution.min_curvature is not None
    assert -4.0 <= solution.min_curvature <= -0.8
    assert solution.relative_change == pytest.approx(
        float((joined(solution.value) - case.right).norm() / case.right.norm()), rel=1e-9
    )
    assert len(solution.residual_curve) == solution.iterations
    assert solution.residual_norms[0] == 1.0
    assert f"tikhonov={solution.tikhonov!r}" in repr(solution)


def test_the_inner_state_is_made_anew_for_the_operator_with_the_term() -> None:
    case = BY_NAME["singular, inconsistent"]
    solution, operator = solve_case(Escalating(Dense()), case)
    torch.testing.assert_close(joined(solution.value), tikhonov_solution(case, solution.tikhonov) * case.length)
    assert solution.num_hvps == len(operator.asked) == 8 + 1 + 8 + 1 + 1


def test_only_breakdowns_escalate() -> None:
    case = BY_NAME["ill-conditioned"]
    short, operator = solve_case(Escalating(CG(2, rtol=1e-9)), case)
    assert (short.status, short.tikhonov, len(operator.asked)) == (Status.NOT_CONVERGED, 0.0, 2)
    first_order, operator = solve_case(Escalating(Identity()), BY_NAME["indefinite"])
    assert (first_order.status, first_order.tikhonov, len(operator.asked)) == (Status.BUDGET, 0.0, 0)
    drifting = Counting(lambda v: {name: leaf * math.nan for name, leaf in v.items()})
    assert Escalating(CG()).solve(drifting, case.b).status is Status.NON_FINITE
    assert len(drifting.asked) <= 2


def test_a_start_and_scale_equivariance() -> None:
    case = BY_NAME["indefinite"]
    start = case.split(vector(8, seed=3))
    solver = Escalating(CG(60, rtol=1e-9))
    warm = solver.solve(dense(case.matrix, case.split), case.b, x0=start)
    assert warm.status is Status.CONVERGED
    exact = torch.linalg.solve(case.matrix + warm.tikhonov * torch.eye(8, dtype=torch.float64), case.right)
    torch.testing.assert_close(joined(warm.value), exact, rtol=1e-6, atol=1e-6)
    for factor in (2.0**-800, 2.0**900):
        one, other = (solver.solve(dense(case.matrix, case.split), case.split(case.right * f)) for f in (1.0, factor))
        assert torch.equal(joined(other.value), joined(one.value) * factor)
        assert (one.tikhonov, one.residual_without_tikhonov) == (other.tikhonov, other.residual_without_tikhonov)


def test_the_split_into_leaves_does_not_matter() -> None:
    base = BY_NAME["indefinite"]
    found = [
        solve_case(Escalating(CG(60, rtol=1e-9)), Case("", base.matrix, base.right, shapes, INDEFINITE))[0]
        for shapes in (((8,),), ((2, 2), (), (3,)))
    ]
    assert found[0].tikhonov == pytest.approx(found[1].tikhonov, rel=1e-9)
    torch.testing.assert_close(joined(found[0].value), joined(found[1].value), rtol=1e-7, atol=1e-9)


def test_a_system_solves_the_one_with_the_term_and_the_hypergradient_says_so() -> None:
    case = BY_NAME["indefinite"]
    problem = Quadratic(case)
    y = {name: leaf.detach() for name, leaf in case.split(vector(8, seed=7)).items()}
    system = linearize(problem, {}, y, [1.0], solver=Escalating(CG(60, rtol=1e-9)))
    with_system = system.hypergradient(None)
    assert with_system.solution is not None
    assert with_system.solution.status is Status.CONVERGED
    assert with_system.solution.tikhonov > 0.0
    same = linearize(problem, {}, y, [1.0], solver=CG(60, rtol=1e-9), tikhonov=with_system.solution.tikhonov).solve(
        case.b
    )
    torch.testing.assert_close(with_system.solution.value, same.value, rtol=1e-7, atol=1e-9)


class Saddle(Problem):
    """``L = 1/2 y'Ay - x'y`` with an indefinite A, ``F = 1/2 ||y||^2``."""

    matrix = with_spectrum([-0.5, 0.5, 1.0, 2.0])

    def lower_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
        y = lower["y"]
        return 0.5 * y @ self.matrix @ y - upper["x"] @ y

    def upper_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
        return 0.5 * lower["y"].square().sum()


@pytest.mark.parametrize("solver", [Escalating(CG(20)), MINRES(20), CG(20, layerwise=True)])
def test_a_training_record_carries_the_term_and_the_ritz_range(solver: Solver, tmp_path: Path) -> None:
    upper = {"x": vector(4).requires_grad_()}
    lower = {"y": vector(4, seed=2).requires_grad_()}
    Trainer(
        Saddle(),
        Level(upper, torch.optim.SGD(upper.values(), lr=0.01), [None]),
        Level(lower, torch.optim.SGD(lower.values(), lr=0.01), [None]),
        AlternatingSchedule(alternations=1, lower_steps=1, upper_steps=1),
        solver,
        callbacks=[JSONLWriter(tmp_path / "metrics.jsonl")],
        on_failure="ignore",
    ).run()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (record,) = (r for r in records if r["event"] == "upper")
    if solver == CG(20, layerwise=True):
        assert (record["tikhonov"], record["ritz_min"], record["ritz_max"]) == (0.0, None, None)
        return
    assert -0.5 - 1e-9 <= record["ritz_min"] < 0.0 < record["ritz_max"] <= 2.0 + 1e-9
    assert (record["tikhonov"] > 0.5) == isinstance(solver, Escalating)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Escalating("cg"), TypeError, "solver must be a solver such as CG"),  # pyright: ignore[reportArgumentType]
        (lambda: Escalating(Escalating(CG())), ValueError, "itself Escalating"),
        (lambda: Escalating(CG(), factor=1.0), ValueError, "Escalating: factor"),
        (lambda: Escalating(CG(), attempts=0), ValueError, "Escalating: attempts"),
        (lambda: Escalating(CG(), initial=0.0), ValueError, "Escalating: initial"),
        (lambda: Escalating(CG(), initial=math.nan), ValueError, "Escalating: initial"),
    ],
)
def test_bad_options_are_refused_by_name(make: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()
