"""What the message of a failed solve advises fits the problem, and works."""

import contextlib
import re
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import (
    CG,
    AlternatingSchedule,
    Hypergradient,
    Implicit,
    Level,
    Neumann,
    Params,
    SolverError,
    Status,
    Trainer,
    hypergradient,
    ridge,
)
from bilevel.linear import Dense, Diagonal, Escalating, FunctionOperator, Nystrom, Solver, spectrum_bounds
from bilevel.products import ReverseOverReverse
from tests.support.cases import BY_NAME, Case, Quadratic, vector, with_spectrum

SPLIT = ((2, 2), (), (3,))
SYSTEMS = [
    *(BY_NAME[name] for name in ("indefinite", "negative definite", "singular, inconsistent", "zero operator")),
    BY_NAME["unused variables, in demand"],
    *(
        Case(name, with_spectrum(values, seed), vector(8, seed), SPLIT, "indefinite")
        for seed in (1, 2)
        for name, values in (
            (f"one outlier {seed}", [-2.0, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0]),
            (f"hardly indefinite {seed}", [-0.01, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0]),
            (f"symmetric {seed}", [-4.0, -3.0, -2.0, -1.0, 1.0, 2.0, 3.0, 4.0]),
        )
    ),
]
RECOMPUTED = ReverseOverReverse(keep_graph=False)
"""A pass a product, for counting."""

SOLVERS: list[Solver] = [CG(200, 1e-6), CG(200, 1e-6, preconditioner=Diagonal()), Nystrom(4, max_refinements=200)]


class Plain(Quadratic):
    """No regularizer; F = b'y + ||x||^2."""

    def upper_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
        return super().upper_objective(upper, lower, batch) + upper["x"].square().sum()


class Regularized(Plain):
    """With r = 1/2 ||y||^2, whose weight damping raises: A = H / c + I."""

    regularization_weight = 0.1

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return ridge(lower)


def run(problem: Plain, method: Any) -> Hypergradient:
    lower = problem.case.split(torch.zeros_like(problem.case.right))
    upper = {"x": torch.zeros((), dtype=torch.float64)}
    given: dict[str, Any] = {"upper_batch": None, "lower_batches": [1.0]}
    result = hypergradient(problem, upper, lower, method, **given, on_failure="ignore")
    if result.failure is None:
        return result
    assert "; here " not in result.failure
    with pytest.raises(SolverError) as raised:
        hypergradient(problem, upper, lower, method, **given, on_failure="raise")
    return replace(result, failure=str(raised.value))


def advised(text: str | None) -> tuple[float, float]:
    """The term that is in use and the one that a message suggests."""
    found = re.search(r"here raise tikhonov from (\S+) to about ([\d.e+-]+)", text or "")
    assert found is not None, text
    return float(found[1]), float(found[2])


@pytest.mark.parametrize("kind", [Plain, Regularized])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("case", SYSTEMS, ids=str)
def test_with_the_advised_term_the_solve_succeeds(case: Case, solver: Solver, kind: type[Plain]) -> None:
    failed = run(kind(case), solver)
    if failed.failure is None:
        assert kind is Regularized or isinstance(solver, Nystrom)
        return
    before, term = advised(failed.failure)
    assert before == 0.0
    assert ("or raise damping where the regularizer is strictly convex" in failed.failure) == (kind is Regularized)
    mended = run(kind(case), Implicit(solver, tikhonov=term))
    assert mended.solution is not None
    assert mended.solution.status is Status.CONVERGED
    # In the units of A, and no sledgehammer: about the smallest eigenvalue, or a hundredth of the largest.
    matrix = case.matrix / 0.1 + torch.eye(8, dtype=torch.float64) if kind is Regularized else case.matrix
    values = torch.linalg.eigvalsh(matrix)
    limit = max(-2.0 * float(values[0]), 1e-2 * float(values.abs().max())) or 1.0
    assert term <= 1.1 * limit


def test_a_term_in_use_is_raised_and_one_by_leaves_is_added_to() -> None:
    case = BY_NAME["indefinite"]
    found = run(Plain(case), Implicit(CG(200, 1e-6), tikhonov=0.125))
    before, term = advised(found.failure)
    assert before == 0.125
    mended = run(Plain(case), Implicit(CG(200, 1e-6), tikhonov=term))
    assert mended.failure is None
    by_leaf = run(Plain(case), Implicit(CG(200, 1e-6), tikhonov={"leaf1": 0.25}))
    added = re.search(r"here add about ([\d.]+) to tikhonov of every implicit variable$", by_leaf.failure or "")
    assert added is not None
    more = float(added[1])
    every = {"leaf0": more, "leaf1": 0.25 + more, "leaf2": more}
    assert run(Plain(case), Implicit(CG(200, 1e-6), tikhonov=every)).failure is None


def test_damping_is_advised_where_there_is_a_regularizer_even_of_weight_zero() -> None:
    class Unweighted(Regularized):
        regularization_weight = 0.0

    case = BY_NAME["indefinite"]
    for kind, offered in ((Plain, False), (Unweighted, True), (Regularized, True)):
        found = run(kind(case), CG(200, 1e-6))
        assert ("damping" in (found.failure or "")) == offered
    with pytest.raises(ValueError, match="this problem has none"):
        run(Plain(case), Implicit(CG(), damping=1.0))
    assert run(Unweighted(case), Implicit(CG(200, 1e-6), damping=2.0)).failure is None


def test_statuses_alone_know_no_problem_and_advise_no_damping() -> None:
    for status in Status:
        assert "damp" not in status.value
        assert status.ok or status is Status.NON_FINITE or "tikhonov" in status.value


def test_a_scale_too_large_for_neumann_is_told_so() -> None:
    definite = BY_NAME["well-conditioned"]
    found = run(Plain(definite), Neumann(100, 1e-6, scale=1.0))
    advice = re.search(r"here give Neumann a scale of at most ([\d.]+)$", found.failure or "")
    assert advice is not None
    assert run(Plain(definite), Neumann(400, 1e-6, scale=float(advice[1]))).failure is None
    # Of an indefinite A both have to change, and the scale fits the system with the term.
    found = run(Plain(BY_NAME["indefinite"]), Neumann(100, 1e-6, scale=1.0))
    _, term = advised(found.failure)
    advice = re.search(r"and give Neumann a scale of at most ([\d.]+)$", found.failure or "")
    assert advice is not None
    both = Implicit(Neumann(400, 1e-4, scale=float(advice[1])), tikhonov=term)
    assert run(Plain(BY_NAME["indefinite"]), both).failure is None


def test_where_escalating_gives_up_the_advice_is_the_same() -> None:
    case = BY_NAME["indefinite"]
    found = run(Plain(case), Escalating(CG(200, 1e-6), initial=1e-6, attempts=1))
    _, term = advised(found.failure)
    assert run(Plain(case), Implicit(CG(200, 1e-6), tikhonov=term)).failure is None


def test_what_no_term_mends_gets_none() -> None:
    assert "; here " not in (run(Plain(BY_NAME["NaN in the operator"]), CG()).failure or "")
    missed = run(Plain(BY_NAME["ill-conditioned"]), CG(2, 1e-12))
    assert missed.solution is not None
    assert missed.solution.status is Status.NOT_CONVERGED
    assert "; here " not in (missed.failure or "")


def bent(low: float) -> Case:
    matrix = with_spectrum([low, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0], 1)
    return Case(f"from {low}", matrix, vector(8, 1), SPLIT, "indefinite")


@pytest.mark.parametrize("solver", [*SOLVERS[:2], Escalating(CG(200, 1e-6), initial=1e-6, attempts=1)], ids=repr)
def test_what_was_found_before_is_not_advised_where_a_solve_meets_more(solver: Solver) -> None:
    problem = Plain(bent(-0.1))
    assert 0.1 < advised(run(problem, CG(200, 1e-6)).failure)[1] < 0.3
    problem.case = bent(-50.0)
    failed = run(problem, solver)
    assert 50.0 < advised(failed.failure)[1] < 80.0
    assert run(problem, Implicit(SOLVERS[0], tikhonov=advised(failed.failure)[1])).failure is None


class Counted(Plain):
    calls = 0

    def lower_objective(self, upper: Params, lower: Params, batch: float) -> Tensor:
        self.calls += 1
        return super().lower_objective(upper, lower, batch)


class Task(Counted):
    """Of a type that no other test warns of."""


def cost(problem: Counted, on_failure: Any, term: float = 0.0) -> tuple[int, str]:
    """Evaluations of the lower objective that a hypergradient takes, and what it warns of."""
    lower, before = problem.case.split(torch.zeros(8, dtype=torch.float64)), problem.calls
    upper, method = {"x": torch.zeros((), dtype=torch.float64)}, Implicit(CG(200, 1e-6), tikhonov=term, hvp=RECOMPUTED)
    with warnings.catch_warnings(record=True) as caught, contextlib.suppress(SolverError):
        warnings.simplefilter("always")
        hypergradient(problem, upper, lower, method, upper_batch=None, lower_batches=[1.0], on_failure=on_failure)
    return problem.calls - before, "".join(str(w.message) for w in caught)


def fresh(case: Case, kind: type[Counted] = Counted) -> Counted:
    """A problem whose curvature is examined."""
    problem = kind(case)
    cost(problem, "ignore")
    return problem


def test_steps_are_made_where_they_are_shown_and_once_for_a_problem_and_its_terms() -> None:
    problem = fresh(BY_NAME["indefinite"])
    ignored = cost(problem, "ignore")[0]
    assert cost(problem, "ignore")[0] == ignored
    shown = [cost(problem, "raise", term)[0] - cost(problem, "ignore", term)[0] for term in (0.0, 0.0, 0.125, 0.125)]
    assert shown[0] > 0
    assert shown[2] > 0
    assert shown[1] == shown[3] == 0


def test_tasks_of_a_type_that_only_warn_make_them_once_unless_one_meets_more() -> None:
    extra, texts = [], []
    for low in (-0.1, -0.1, -0.1, -50.0, -50.0):
        problem = fresh(bent(low), Task)
        ignored = cost(problem, "ignore")[0]
        calls, text = cost(problem, "warn")
        extra.append(calls - ignored)
        texts.append(advised(text)[1])
    assert [more > 0 for more in extra] == [True, False, False, True, False]
    assert texts[0] == texts[1] == texts[2] < 0.3
    assert 50.0 < texts[3] == texts[4] < 80.0
    # Where it is raised, each is a failure of its own.
    problem = fresh(bent(-0.1), Task)
    assert cost(problem, "raise")[0] > cost(problem, "ignore")[0]


def test_a_trainer_makes_them_once_a_run() -> None:
    def evaluations(on_failure: Any, alternations: int) -> int:
        problem = fresh(bent(-0.1), type("Trained", (Counted,), {}))
        lower, upper = problem.case.split(torch.zeros(8, dtype=torch.float64)), {"x": torch.zeros(2).double()}
        trainer = Trainer(
            problem,
            Level(upper, torch.optim.SGD(upper.values(), lr=0.1), [None]),
            Level(lower, torch.optim.SGD(lower.values(), lr=0.0), [1.0, 1.5, 2.0]),
            AlternatingSchedule(alternations, 1, 1),
            Implicit(CG(200, 1e-6), hvp=RECOMPUTED),
            on_failure=on_failure,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.run()
        return problem.calls

    more = [evaluations("warn", count) - evaluations("ignore", count) for count in (1, 2, 6)]
    assert more[0] == more[1] == more[2] > 0


def test_a_trainer_passes_the_advice_on() -> None:
    def trainer(method: Any, on_failure: Any) -> Trainer:
        problem = Plain(BY_NAME["indefinite"])
        lower, upper = problem.case.split(torch.zeros(8, dtype=torch.float64)), {"x": torch.zeros(2).double()}
        return Trainer(
            problem,
            Level(upper, torch.optim.SGD(upper.values(), lr=0.1), [None]),
            Level(lower, torch.optim.SGD(lower.values(), lr=0.01), [1.0]),
            AlternatingSchedule(2, 1, 1),
            method,
            on_failure=on_failure,
        )

    with pytest.raises(SolverError) as raised:
        trainer(CG(200, 1e-6), "raise").run()
    _, term = advised(str(raised.value))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(Implicit(CG(200, 1e-6), tikhonov=term), "raise").run()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(CG(200, 1e-6), "warn").run()
    assert [advised(str(w.message)) for w in caught] == [(0.0, term)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [5, 40, 300])
def test_hardly_any_eigenvalue_lies_beyond_the_bounds(size: int, seed: int) -> None:
    matrix = with_spectrum(torch.linspace(-1.0, 20.0, size).tolist(), seed)
    bounds = spectrum_bounds(FunctionOperator(lambda v: {"a": matrix @ v["a"]}), {"a": vector(size, seed)})
    assert bounds is not None
    assert -2.5 < bounds[0] < -0.8
    assert 19.5 < bounds[1] < 22.0
    if size <= 15:
        assert bounds == pytest.approx((-1.0, 20.0), rel=1e-8)


def test_bounds_of_what_is_not_finite_are_none() -> None:
    assert spectrum_bounds(FunctionOperator(lambda v: {"a": v["a"] * torch.nan}), {"a": vector(3)}) is None


def test_dense_and_singular_systems_are_advised_too() -> None:
    case = BY_NAME["singular, inconsistent"]
    _, term = advised(run(Plain(case), Dense()).failure)
    assert run(Plain(case), Implicit(Dense(), tikhonov=term)).failure is None
