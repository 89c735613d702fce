"""F(x, y*(x)) as a function of x: the lower problem solved anew for every x, by the user's own solver."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, reduce
from typing import Any, final

import torch

from bilevel import distributed, tree
from bilevel.lower.derivatives import lower_derivatives
from bilevel.lower.kinds.fields import mean_residual
from bilevel.lower.kinds.residual import ResidualProblem
from bilevel.nn import curvature_pass
from bilevel.problem import Problem
from bilevel.tree import Params

LowerSolver = Callable[[Problem, Params, Params, Sequence[Any]], Params]
"""``lower_solver(problem, upper, lower, lower_batches) -> lower``: solves the lower problem from `lower` on."""


class OutOfTime(Exception):
    """The budget of seconds is spent."""


@final
class Solves:
    """Counts the solves of the lower problem, tells of each, and ends them when the time is over."""

    def __init__(self, seconds: float | None, progress: Callable[[str], None] | None) -> None:
        self.seconds, self.progress = seconds, progress
        self.count, self.spent, self.began = 0, 0.0, time.perf_counter()

    def make(self, where: str, solve: Callable[[], Params]) -> Params:
        """What `solve` returns.

        Raises:
            OutOfTime: on any rank the time was over before it, and it is not the first one.
        """
        started = time.perf_counter()
        over = self.seconds is not None and started - self.began > self.seconds
        if self.count and distributed.agree(over):
            raise OutOfTime
        solved = solve()
        took = time.perf_counter() - started
        self.count, self.spent = self.count + 1, self.spent + took
        if self.progress is not None:
            self.progress(f"solve {self.count}, {where}: {took:.2g} s")
        return solved

    def __str__(self) -> str:
        solves = "solve" if self.count == 1 else "solves"
        return f"{self.count} {solves} of {self.spent / max(self.count, 1):.2g} s"


@dataclass(frozen=True)
class Resolved:
    """F(x, y*(x)) as a function of x, y solved for from `start` at every x; `where` is for the progress."""

    problem: Problem
    lower_solver: LowerSolver
    start: Params
    upper_batch: Any
    lower_batches: Sequence[Any]
    solves: Solves
    where: str

    def solve(self, upper: Params) -> Params:
        def call() -> Params:
            with torch.enable_grad(), curvature_pass():
                return self.lower_solver(self.problem, upper, self.start, self.lower_batches)

        solved = self.solves.make(self.where, call)
        tree.check_params("lower_solver's result", solved)
        return tree.detach(solved)

    def value(self, upper: Params, lower: Params) -> float:
        with torch.no_grad(), curvature_pass():
            return float(self.problem.upper_objective(upper, lower, self.upper_batch))

    def left_by_the_solver(self, upper: Params, solution: Params | None) -> tuple[float, float]:
        """F at other upper values, and how much of it is open after the lower problem is solved there.

        That is what a second solve changes and, to first order, ``<A^-1 dF/dy, dG/dy>``, if `solution` is given: of the
        linear system ``A x = dF/dy`` whose A is divided by the weight of the regularizer.
        """
        lower = replace(self, where="beside x").solve(upper)
        again = replace(self, where="beside x, once more", start=lower).solve(upper)
        value = self.value(upper, lower)
        left = abs(self.value(upper, again) - value)
        if solution is not None:
            left = max(left, abs(float(tree.dot(solution, self._scaled_gradient(upper, lower, list(solution))))))
        return value, left

    def _scaled_gradient(self, upper: Params, lower: Params, names: Sequence[str]) -> Params:
        """dG/dy over some lower variables, divided as the linear system is; the residual of a lower level that is no
        smooth minimum."""
        if isinstance(self.problem, ResidualProblem):
            return mean_residual(self.problem, upper, lower, names, self.lower_batches)
        gradients = [lower_derivatives(self.problem, upper, lower, names, batch, 0)[1] for batch in self.lower_batches]
        weight = self.problem.regularization_weight
        regularized = weight > 0.0 and self.problem.regularizer(upper, lower) is not None
        return tree.scale(1.0 / (len(gradients) * (weight if regularized else 1.0)), reduce(tree.add, gradients))

    def along(self, point: Params, direction: Params, where: str) -> Callable[[float], float]:
        """F(x + h u) as a function of h, each value computed once."""

        @cache
        def value(step: float) -> float:
            upper = tree.axpy(step, direction, point)
            return self.value(upper, replace(self, where=f"{where}, step {step:+.1e}").solve(upper))

        return value


def reweighted(problem: Problem, weight: float) -> Problem:
    """A shallow copy with another regularization weight, whether that is an attribute, a field or a property."""
    twin, kind = copy.copy(problem), type(problem)
    body = {"regularization_weight": property(lambda self: weight), "__module__": kind.__module__}
    # By way of object, for a frozen dataclass.
    object.__setattr__(twin, "__class__", type(kind.__name__, (kind,), body))
    return twin
