"""`check_hypergradient` ends early: out of time, or with a lower solver that is not worth the differences."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from bilevel import CG, Implicit, Method, Params, SGDUpdate, Unrolled, check_hypergradient
from bilevel.hypergradients import HypergradientCheck
from bilevel.lower import resolved as resolved_module
from tests.support.problems.closed_forms import QuadraticBilevel, proximal_point, quadratic

Solver = Callable[[Any, Params, Params, Sequence[Any]], Params]


def exact(problem: Any, upper: Params, lower: Params, batches: Sequence[Any]) -> Params:
    y = problem.solution(upper)
    return {"head": y[:1].reshape(()), "body": y[1:].reshape(2, 2)}


def descent(steps: int, rate: float = 0.3) -> Solver:
    """Plain gradient descent from the start."""

    def solve(problem: Any, upper: Params, lower: Params, batches: Sequence[Any]) -> Params:
        for _ in range(steps):
            y = {name: leaf.detach().requires_grad_() for name, leaf in lower.items()}
            loss = problem.lower_objective(upper, y, batches[0])
            penalty = problem.regularizer(upper, y)
            total = loss if penalty is None else loss + problem.regularization_weight * penalty
            gradient = torch.autograd.grad(total, list(y.values()))
            lower = {name: y[name].detach() - rate * g for name, g in zip(y, gradient, strict=True)}
        return lower

    return solve


def check(solver: Solver, method: Method | None = None, start: Params | None = None, **options: Any) -> Any:
    _, upper, lower = quadratic()
    start = {name: torch.zeros_like(leaf) for name, leaf in lower.items()} if start is None else start
    return check_hypergradient(
        *(QuadraticBilevel(), upper, start, method),
        upper_batch=None,
        lower_batches=[None],
        lower_solver=solver,
        **options,
    )


def at_the_solution() -> Params:
    problem, upper, lower = quadratic()
    return exact(problem, upper, lower, [None])


METHODS = [Implicit(CG(50, 1e-10)), Unrolled(SGDUpdate(0.3))]


@pytest.mark.parametrize("method", METHODS, ids=["implicit", "unrolled"])
@pytest.mark.parametrize("start", [None, at_the_solution()], ids=["from afar", "from the solution"])
@pytest.mark.parametrize("steps", [1, 5])
def test_a_lower_solver_that_stops_short_gets_its_verdict_at_once(
    steps: int, start: Params | None, method: Method
) -> None:
    report = check(descent(steps), method, start)
    assert report.verdict.startswith("not solved: the lower solver does not reach stationarity (")
    assert "would measure the solver" in report.verdict
    assert not report.agrees
    assert report.solves == 3
    assert report.measured == ()
    assert report.relative_error != report.relative_error
    assert len(re.findall(r"^ +\d  [+-]\S+  -$", str(report), re.MULTILINE)) == 4


def test_one_that_hardly_moves_is_seen_by_the_gradient_that_it_leaves() -> None:
    # A second solve changes next to nothing: only the linear system knows how far the solution is.
    report = check(descent(1, rate=1e-7), Implicit(CG(50, 1e-10)), at_the_solution())
    assert report.verdict.startswith("not solved")
    assert report.uncertainty > 1e-2


def test_the_damped_problem_is_what_has_to_be_solved() -> None:
    problem, upper, lower = proximal_point()
    for steps, said in ((3, "not solved"), (400, "right")):
        report = check_hypergradient(
            *(problem, upper, lower, Implicit(CG(50, 1e-11), damping=1.0)),
            upper_batch=None,
            lower_batches=[None],
            lower_solver=descent(steps, rate=0.1),
        )
        assert report.verdict.startswith(said), report.verdict


@pytest.mark.parametrize("method", METHODS[:1], ids=["implicit"])
def test_one_that_converges_goes_on(method: Method) -> None:
    report = check(descent(400), method)
    assert report.verdict.startswith("right")
    assert report.agrees
    assert report.solves > 20


def test_what_a_solver_leaves_counts_as_uncertainty() -> None:
    # Off by less than ends the check at once and by more than the tolerance: neither right nor wrong.
    rate = 0.3
    eigenvalues = torch.linalg.eigvalsh(QuadraticBilevel.A)
    slowest = float((1.0 - rate * eigenvalues).abs().max())
    verdicts = []
    for left in (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 1e-7):
        steps = next(k for k in range(1, 10000) if slowest**k < left)
        verdicts.append(check(descent(steps), start=at_the_solution()).verdict.split(":")[0])
    assert sorted(verdicts, key=["not solved", "undecided", "right"].index) == verdicts
    assert set(verdicts) == {"not solved", "undecided", "right"}


class Clock:
    """Each reading is a second later."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(resolved_module, "time", clock)
    return clock


@pytest.mark.parametrize(("seconds", "solves"), [(1e-3, 1), (3.5, 2), (10.5, 5), (30.5, 15)])
def test_no_solve_begins_after_the_budget(seconds: float, solves: int, clock: Clock) -> None:
    report = check(exact, seconds=seconds)
    assert report.solves == solves
    assert not report.agrees
    noun = "solve" if solves == 1 else "solves"
    assert f"; {solves} {noun}\n" in f"{report}\n"
    assert report.verdict.startswith(
        f"unfinished: the budget of {seconds:g} seconds was spent after {solves} {noun} of 1 s"
    )
    known = len(report.measured)
    assert ("so far, along" in report.verdict) == (known > 0)
    assert len(report.predicted) == 4
    assert known < 4
    str(report)


def test_what_is_known_of_some_directions_is_said(clock: Clock) -> None:
    report = check(exact, seconds=40.5)
    assert 0 < len(report.measured) < 4
    assert report.relative_error < 1e-5
    assert f"so far, along {len(report.measured)} directions, it differs by" in report.verdict


def test_a_budget_that_suffices_changes_nothing() -> None:
    whole, limited = check(exact), check(exact, seconds=1e9)
    assert limited.agrees
    assert (limited.verdict, limited.measured, limited.solves) == (whole.verdict, whole.measured, whole.solves)


def test_a_line_a_solve() -> None:
    lines: list[str] = []
    report: HypergradientCheck = check(exact, progress=lines.append, directions=2)
    assert len(lines) == report.solves
    assert [line.split(",")[0] for line in lines] == [f"solve {n}" for n in range(1, report.solves + 1)]
    assert re.fullmatch(r"solve 1, at x: \S+ s", lines[0])
    assert re.fullmatch(r"solve 4, direction 1 of 2, step [+-]\S+: \S+ s", lines[3])
    assert "direction 2 of 2" in lines[-1]


@pytest.mark.parametrize(
    ("option", "error"),
    [({"seconds": 0.0}, ValueError), ({"seconds": "1"}, ValueError), ({"progress": True}, TypeError)],
)
def test_bad_options_are_named(option: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(option))):
        check(exact, **option)
