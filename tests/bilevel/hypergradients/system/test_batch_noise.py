"""A mini-batch system that is solved accurately is biased: measured on a quadratic with closed forms, and said."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import (
    CG,
    MINRES,
    AlternatingSchedule,
    Hypergradient,
    Implicit,
    Level,
    Neumann,
    Params,
    Problem,
    SolverWarning,
    Status,
    Trainer,
    hypergradient,
    linearize,
)
from bilevel.hypergradients import Method
from bilevel.linear import Dense, Escalating, Nystrom, Solver
from bilevel.tree import norm

ROWS, SIZE = 1024, 10


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Z, TARGET = _normal(ROWS, SIZE, seed=0), _normal(SIZE, seed=1)
INVERSE = torch.linalg.inv(Z.T @ Z / ROWS)


class Quadratic(Problem):
    """L = 1/2 mean_i (z_i'y)^2 - x'y and F = 1/2 ||y - w||^2 + 1/2 ||x||^2: y* = H^-1 x, dF/dx = x + H^-1 (y* - w)."""

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return 0.5 * (batch @ lower["y"]).square().mean() - upper["x"] @ lower["y"]

    def upper_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
        return 0.5 * (lower["y"] - TARGET).square().sum() + 0.5 * upper["x"].square().sum()


# The optimum of the whole: dF/dx = 0 there.
X = torch.linalg.solve(INVERSE @ INVERSE + torch.eye(SIZE, dtype=torch.float64), INVERSE @ TARGET)
UPPER, LOWER = {"x": X}, {"y": INVERSE @ X}


def draws(rows: int, count: int, seed: int = 3) -> Iterator[list[Tensor]]:
    """Lists of `count` batches of `rows` rows, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield [Z[torch.randint(ROWS, (rows,), generator=generator)] for _ in range(count)]


def run(problem: Problem, method: Method | Solver, batches: list[Any], lower: Params | None = None) -> Hypergradient:
    return hypergradient(problem, UPPER, lower or LOWER, method, upper_batch=None, lower_batches=batches)


def said(method: Method | Solver, batches: Iterator[list[Any]], times: int = 6) -> list[str]:
    """Warnings of bias over several hypergradients of one problem."""
    problem = Quadratic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            run(problem, method, next(batches))
    return [str(w.message) for w in caught if "biased in the mean" in str(w.message)]


def test_the_whole_has_the_right_hypergradient_of_zero() -> None:
    assert float(norm(run(Quadratic(), CG(50, 1e-12), [Z]).grad)) < 1e-12


def mean_and_error(solver: Solver, batches: Iterator[list[Tensor]], times: int) -> tuple[float, float]:
    """Norm of the mean hypergradient, and its standard error."""
    problem = Quadratic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.stack([run(problem, solver, next(batches)).grad["x"] for _ in range(times)])
    return float(found.mean(dim=0).norm()), float((found.var(dim=0).sum() / times).sqrt())


def test_solving_one_batch_more_accurately_makes_the_mean_worse() -> None:
    loose, _ = mean_and_error(CG(1, None), draws(16, 1), 60)
    tight, error = mean_and_error(CG(50, 1e-10), draws(16, 1), 200)
    assert tight > 3.0 * error, "the truth is 0"
    assert tight > 4.0 * loose
    # With sixteen times the rows, in four batches, it is down by more than that.
    assert mean_and_error(CG(50, 1e-10), draws(64, 4), 60)[0] < tight / 16.0


TIGHT = [CG(50, 1e-8), CG(50, 1e-2), CG(10, None), CG(50, 1e-8, recycle=4), MINRES(50, 1e-8), Dense()]


@pytest.mark.parametrize("solver", [*TIGHT, Escalating(CG(50, 1e-8)), Implicit(CG(50, 1e-8))], ids=repr)
@pytest.mark.parametrize(("rows", "count"), [(16, 1), (8, 2), (4, 4)])
def test_it_is_said_once_where_the_batches_are_samples(solver: Method | Solver, rows: int, count: int) -> None:
    (text,) = said(solver, draws(rows, count))
    for remedy in ("more Hessian batches", 'rtol="noise"', "raise tikhonov", "looser rtol"):
        assert remedy in text


@pytest.mark.parametrize(
    ("method", "rows", "count"),
    [
        *((CG(50, 1e-8), 256, 1), (CG(50, 1e-8), 64, 4), (Dense(), 256, 4)),
        *((CG(50, "noise"), 8, 2), (CG(1, None), 16, 1), (CG(50, 0.5), 8, 4), (Neumann(1), 8, 4)),
    ],
)
def test_where_the_noise_is_small_or_the_solve_no_more_accurate_nothing_is_said(
    method: Method | Solver, rows: int, count: int
) -> None:
    assert said(method, draws(rows, count)) == []


def repeated(batches: list[Any]) -> Iterator[list[Any]]:
    while True:
        yield batches


@pytest.mark.parametrize("count", [1, 2, 4])
def test_batches_that_come_again_may_be_all_the_data(count: int) -> None:
    few = [Z[8 * k : 8 * k + 8] for k in range(count)]
    assert said(CG(50, 1e-10), repeated(few)) == []
    assert said(CG(50, 1e-10), repeated([Z.chunk(count)[k] for k in range(count)])) == []


@pytest.mark.parametrize("count", [1, 2])
def test_tasks_that_are_each_solved_are_no_samples(count: int) -> None:
    problem = Quadratic()
    for _, batches in zip(range(6), draws(16, count), strict=False):
        H = torch.cat(batches).T @ torch.cat(batches) / (16 * count)
        run(problem, CG(50, 1e-10), batches, {"y": torch.linalg.solve(H, X)})


class Whole(Quadratic):
    """Takes batches of sixteen rows and no others."""

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return super().lower_objective(upper, lower, batch.view(16, SIZE))


class NoSplit(Quadratic):
    def split_batch(self, batch: Any, size: int) -> list[Any]:
        raise ValueError("these rows belong together")


def test_of_tasks_that_are_not_quite_solved_what_is_said_is_true() -> None:
    problem = Quadratic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _, (batch,) in zip(range(6), draws(16, 1), strict=False):
            y = torch.linalg.solve(batch.T @ batch / 16, X)
            run(problem, CG(50, 1e-10), [batch], {"y": y + 0.5 * y.norm() / SIZE**0.5})
    for warning in caught:
        assert "if these batches are samples of one data set" in str(warning.message)
        assert "the whole of a task of its own, there is no such bias" in str(warning.message)
    assert len(caught) == 1


@pytest.mark.parametrize("solver", [CG(2, 1e-8), MINRES(2, 1e-8), Nystrom(4), Neumann(3, 1e-8)], ids=repr)
def test_a_solve_that_fails_is_not_called_accurate(solver: Solver) -> None:
    problem, batches = Quadratic(), draws(4, 4)
    failures = []
    for _ in range(6):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = run(problem, solver, next(batches))
        assert found.solution is not None
        assert found.failure is None or found.warning is None
        failures.append(found.failure)
    assert None not in failures


def test_the_residual_that_is_told_is_the_one_that_was_reached() -> None:
    problem, batches = Quadratic(), draws(4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [run(problem, CG(50, 1e-2), next(batches)) for _ in range(3)]
    (told,) = [result for result in found if result.warning is not None]
    assert told.solution is not None
    assert f"relative residual of {told.solution.residual_norms[1]:.1e}, " in str(told.warning)


def test_a_solve_that_is_lost_in_the_noise_is_said_once_for_a_problem() -> None:
    # Two batches that hardly agree, also where they are all there is.
    pair = [Z[:2], Z[2:4]]
    for batches in (draws(2, 2), repeated(pair)):
        problem = Quadratic()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = [run(problem, CG(50, "noise"), next(batches)) for _ in range(6)]
        lost = [result for result in found if result.solution and result.solution.status is Status.LOST_IN_THE_NOISE]
        assert len(lost) > 1
        assert [result for result in found if result.warning is not None] == lost[:1]
        assert all(result.failure is None for result in lost)
        (text,) = [str(w.message) for w in caught if "lost in the noise" in str(w.message)]
        assert "cannot tell the solution from zero" in text


@pytest.mark.parametrize("kind", [Whole, NoSplit])
def test_a_batch_that_has_no_halves_is_not_measured(kind: type[Problem]) -> None:
    problem = kind()
    for _, batches in zip(range(4), draws(16, 1), strict=False):
        result = run(problem, CG(50, 1e-10), batches)
        assert result.warning is None
        assert result.solution is not None
        assert result.solution.noise is None


@pytest.mark.parametrize("solver", [*TIGHT, Neumann(5), Escalating(CG(5, 1e-2))], ids=repr)
def test_the_noise_comes_for_nothing_and_changes_nothing(solver: Solver) -> None:
    batches = next(draws(64, 3))
    system = linearize(Quadratic(), UPPER, LOWER, batches, solver=solver)
    b = {"y": LOWER["y"] - TARGET}
    plain = solver.solve(system.operator, b)
    found = system.solve(b)
    assert torch.equal(found.value["y"], plain.value["y"])
    assert (found.num_hvps, found.residual_norms) == (plain.num_hvps, plain.residual_norms)
    assert plain.noise is None
    assert found.noise is not None
    if not isinstance(solver, Dense):
        # Written out: the spread of the three products with the first direction, which is b.
        products = torch.stack([rows.T @ (rows @ b["y"]) / 64 for rows in batches])
        gain = float((products.var(dim=0).sum() / 3).sqrt() / b["y"].norm())
        expected = gain * float(found.value["y"].norm() / b["y"].norm())
        assert found.noise == pytest.approx(expected, rel=1e-10)


def test_on_failure_says_whether_it_is_shown() -> None:
    for on_failure, shown in (("warn", 1), ("raise", 1), ("ignore", 0)):
        problem, batches, found = Quadratic(), draws(8, 2), []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(4):
                found.append(
                    hypergradient(
                        problem,
                        UPPER,
                        LOWER,
                        CG(50, 1e-8),
                        upper_batch=None,
                        lower_batches=next(batches),
                        on_failure=on_failure,  # type: ignore[arg-type]
                    )
                )
        assert len(caught) == shown
        assert all(issubclass(w.category, SolverWarning) for w in caught)
        assert [result.warning is not None for result in found].count(True) == 1
        assert all(result.failure is None for result in found)


@pytest.mark.parametrize(("data", "count"), [([Z[:8]], 0), ([Z[16 * k : 16 * k + 16] for k in range(12)], 1)])
def test_a_trainer_says_it_once_where_its_data_are_more_than_one_batch(data: list[Tensor], count: int) -> None:
    upper, lower = {"x": X.clone()}, {"y": LOWER["y"].clone()}
    trainer = Trainer(
        Quadratic(),
        Level(upper, torch.optim.SGD(upper.values(), lr=1e-4), [None]),
        Level(lower, torch.optim.SGD(lower.values(), lr=1e-4), data),
        AlternatingSchedule(4, 3, 2),
        CG(50, 1e-8),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.run()
    assert len([w for w in caught if "biased in the mean" in str(w.message)]) == count
