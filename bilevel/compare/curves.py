"""Error against products and against time: solvers on one system, with the number of iterations growing.

The system meets several right-hand sides twice: as the first one of a fresh state, and as a later one whose state has
answered another already. Times are multiples of one gradient of the lower objective over the same batches; the first
right-hand side pays for its linearization.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.compare.measuring import Deadline, Timing, interleaved, now
from bilevel.compare.solvers import Families, of_budget, preparation
from bilevel.hypergradients import System
from bilevel.linear import Dense, Solution, Solver, Status
from bilevel.lower import ProximalProblem, ResidualProblem
from bilevel.nn import curvature_pass
from bilevel.problem import Problem
from bilevel.products import HVPProvider
from bilevel.tree import Params

ITERATIONS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 80)
EXACT_ENOUGH = 1e-9
_LARGEST_PART = 1 / 3
_BRIEF = 0.05
"""Seconds below which a solve is made once before it is timed."""


@dataclass(frozen=True)
class KnownSystem:
    """A system A x = b whose solutions are known for several right-hand sides.

    Attributes:
        linearize: makes the `System` anew, for a solver and for a provider (None: the one that is measured with).
        gradient: one gradient of the lower objective over the system's batches, the unit of time.
        rights, exact: every b, and the flattened x that solves it.
        iterations: of the curves' points, ascending.
        noise: what another choice of lower batches would change x by, relative to x; None where it is not known.
    """

    name: str
    linearize: Callable[[Solver, HVPProvider | None], System]
    gradient: Callable[[], object]
    rights: Sequence[Params]
    exact: Sequence[Tensor]
    iterations: Sequence[int] = ITERATIONS
    noise: float | None = None

    def error(self, index: int, x: Params) -> float:
        """``||x - exact|| / ||exact||`` for right-hand side `index`."""
        return relative(tree.flatten({name: x[name] for name in self.rights[index]}), self.exact[index])

    def unit(self, repeats: int = 31) -> float:
        """Seconds of `gradient`, the median."""
        return interleaved({"gradient": self.gradient}, repeats)["gradient"].median


def relative(x: Tensor, reference: Tensor) -> float:
    """``||x - reference|| / ||reference||``, in the precision of the reference."""
    return float((x.to(reference) - reference).norm() / reference.norm())


def lower_gradient(problem: Problem, upper: Params, lower: Params, batch: Any) -> Params:
    """dL/dy on one batch by a plain pass that writes no buffer: what times are multiples of.

    Of a lower level without an objective it is the gradient of ``1/2 ||S||^2``, S being its residual.
    """
    y = tree.as_variables(lower)
    with torch.enable_grad(), curvature_pass():
        if isinstance(problem, ResidualProblem) and not isinstance(problem, ProximalProblem):
            residual = problem.residual(tree.detach(upper), y, batch)
            return tree.gradients(0.5 * tree.dot(residual, residual), y)
        return tree.gradients(problem.lower_objective(tree.detach(upper), y, batch), y)


@dataclass
class _Point:
    """What one solver did with one number of iterations, over the right-hand sides."""

    errors: list[float]
    products: list[float]
    seconds: list[float]
    statuses: set[str]

    def record(self, budget: int, unit: float) -> dict[str, Any]:
        return {
            "budget": budget,
            "error": Timing(tuple(self.errors)).record(),
            "errors": self.errors,
            "products": self.products,
            "gradients": [value / unit for value in self.seconds],
            "status": self._status(),
        }

    def _status(self) -> str:
        """The one of all right-hand sides, or one of several that are successes alike."""
        alike = len(self.statuses) == 1 or all(Status[name].ok for name in self.statuses)
        return min(self.statuses) if alike else "MIXED"


def measure_curves(
    known: KnownSystem, solvers: Families, unit: float, *, deadline: Deadline | None = None, pace: float = 0.0
) -> tuple[list[dict[str, Any]], list[str]]:
    """The curves of all solvers, first and later right-hand sides, and in words what the time did not suffice for;
    of each curve, whether the time has cut it.

    A solver that is exact enough goes no further. Each may take a third of the time that those before it have left;
    no point is begun that would not fit, going by the one before it.

    Args:
        unit: seconds of a gradient, `KnownSystem.unit`.
        pace: seconds of a product, as far as it is known.
    """
    deadline = Deadline(None) if deadline is None else deadline
    rows: list[dict[str, Any]] = []
    cuts: list[str] = []
    for position, (name, family) in enumerate(solvers.items()):
        run = _Curves(known, unit, deadline.share(max(_LARGEST_PART, 1.0 / (len(solvers) - position))), pace)
        budgets, cut = known.iterations[:1] if isinstance(family, Solver) else known.iterations, False
        for budget in budgets:
            # Of the first two there is a point in any case.
            if (run.made or position > 1) and not run.fits(of_budget(family, budget), budget):
                cuts.append(f"{name} ends at {_iterations(run.made)}" if run.made else f"{name} was not measured")
                cut = True
                break
            if run.measure(of_budget(family, budget), budget):
                break
        found = {use: points for use, points in run.curves.items() if points}
        row = {"system": known.name, "solver": name, "cut": cut}
        rows += [{**row, "use": use, "points": points} for use, points in found.items()]
    return rows, cuts


def _iterations(count: int) -> str:
    return "1 iteration" if count == 1 else f"{count} iterations"


class _Curves:
    """One solver's points as they are made; `pace` is seconds a product, `made` the iterations of the last point."""

    def __init__(self, known: KnownSystem, unit: float, limit: Deadline, pace: float) -> None:
        self.known, self.unit, self.limit, self.pace, self.made = known, unit, limit, pace, 0
        self.curves: dict[str, list[dict[str, Any]]] = {"first": [], "later": []}
        self._last = 0.0

    def fits(self, solver: Solver, budget: int) -> bool:
        """Whether the point is likely to be done in time."""
        return self._expected(solver, budget, 1) <= self.limit.left()

    def measure(self, solver: Solver, budget: int) -> bool:
        """Add a point; whether it is exact enough."""
        count = len(self.known.rights)
        if not self.made and not isinstance(solver, Dense) and self._solve_seconds(solver, budget) < _BRIEF:
            self.known.linearize(solver, None).solve(self.known.rights[0])
        # One product for each variable is timed once, and so is whatever would take too long otherwise.
        once = isinstance(solver, Dense) or self._expected(solver, budget, count) > self.limit.left()
        start = now()
        points = _solve_all(self.known, solver, 1 if once else count)
        self._last, self.made = now() - start, budget
        for use, point in points.items():
            if point.errors:
                self.curves[use].append(point.record(budget, self.unit))
            if sum(point.products) and (use == "later" or count == 1):
                self.pace = sum(point.seconds) / sum(point.products)
        return all(max(point.errors) <= EXACT_ENOUGH for point in points.values() if point.errors)

    def _solve_seconds(self, solver: Solver, budget: int) -> float:
        return self.pace * (preparation(solver, tree.size(self.known.rights[0])) + budget)

    def _expected(self, solver: Solver, budget: int, states: int) -> float:
        """Seconds of the point with so many fresh states, going by the last point and by the pace of a product."""
        later = len(self.known.rights) - 1
        if self.made:
            return self._last + (states + later) * self.pace * (budget - self.made)
        return states * self._solve_seconds(solver, budget) + later * self.pace * budget


def _solve_all(known: KnownSystem, solver: Solver, states: int) -> dict[str, _Point]:
    """Solutions of the first `states` right-hand sides with fresh states, and of all but one with the first state."""
    points = {use: _Point([], [], [], set()) for use in ("first", "later")}
    kept = None
    for index, b in enumerate(known.rights):
        if index < states:
            start = now()
            fresh = known.linearize(solver, None)
            solution = fresh.solve(b)
            _add(points["first"], known, index, solution, now() - start)
            kept = fresh if kept is None else kept
        if index and kept is not None:
            start = now()
            solution = kept.solve(b)
            _add(points["later"], known, index, solution, now() - start)
    return points


def _add(point: _Point, known: KnownSystem, index: int, solution: Solution, seconds: float) -> None:
    point.errors.append(known.error(index, solution.value))
    point.products.append(solution.num_hvps)
    point.seconds.append(seconds)
    point.statuses.add(solution.status.name)


def to_tolerance(row: Mapping[str, Any], tolerance: float) -> dict[str, Timing] | None:
    """Products and gradients until the error is below the tolerance, one sample a right-hand side; None where one of
    them never gets there."""
    products, gradients = [], []
    for index in range(len(row["points"][0]["errors"])):
        reached = [point for point in row["points"] if len(point["errors"]) > index]
        reached = [point for point in reached if point["errors"][index] <= tolerance]
        if not reached:
            return None
        products.append(reached[0]["products"][index])
        gradients.append(reached[0]["gradients"][index])
    return {"products": Timing(tuple(products)), "gradients": Timing(tuple(gradients))}
