"""A growing Tikhonov term as an answer to breakdowns."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

from bilevel import tree
from bilevel.checks import check_count, check_kind, check_number
from bilevel.linear.account import CountedOperator
from bilevel.linear.lanczos import ritz_values, union_of_ranges
from bilevel.linear.operators import LinearOperator, TikhonovOperator
from bilevel.linear.solution import Solution, Status
from bilevel.linear.solver import Solver, residual
from bilevel.tree import Params

_BREAKDOWNS = (Status.NEGATIVE_CURVATURE, Status.DIVERGED, Status.INCONSISTENT)
_LANCZOS_STEPS = 5
_SMALLEST_PART = 1e-3


@dataclass
class _Level:
    """The Tikhonov term that serves an operator, 0 until a breakdown, and the inner solver's state for it."""

    state: Any
    tikhonov: float = 0.0


@final
@dataclass(frozen=True)
class Escalating(Solver):
    """Another solver, helped over breakdowns by a growing multiple of the identity.

    Where `solver` ends with NEGATIVE_CURVATURE, DIVERGED or INCONSISTENT, ``(A + s I) x = b`` is solved instead, for
    s = initial, ``factor * initial``, ... until no such breakdown occurs. The Solution is then that of the last of
    these systems, its status included: `Solution.tikhonov` > 0 says that it is not one of A x = b, and
    `Solution.residual_without_tikhonov` how far from one, measured by one more product. Where `attempts` terms break
    down too, it is the solution of the first try. `num_hvps` counts everything.

    The term that worked stays in the state, and later right-hand sides start with it: they share one operator, and so
    one system. No such term helps `Neumann` with a given scale that is too large for A.

    Args:
        solver: what solves; it is prepared anew for every term.
        factor: by which the Tikhonov term grows.
        attempts: at most this many terms for one right-hand side.
        initial: the first term, in units of A's eigenvalues. None takes ``max(-2 l, size / 1000)``, with l the
            smallest eigenvalue estimate and size the largest modulus of one: Ritz values of the solve that broke down
            or, where it has none, of 5 Lanczos steps from b (counted). For A = 0 it takes 1.

    Raises:
        TypeError: a solver that is not a `Solver`.
        ValueError: a solver that is itself Escalating, factor <= 1, attempts < 1, an initial that is not positive.
    """

    solver: Solver
    factor: float = 10.0
    attempts: int = 3
    initial: float | None = None

    def __post_init__(self) -> None:
        check_kind("Escalating: solver", self.solver, Solver, "a solver such as CG()")
        if isinstance(self.solver, Escalating):
            raise ValueError("Escalating: solver is itself Escalating; raise attempts instead")
        check_count("Escalating: attempts", self.attempts, least=1)
        check_number("Escalating: factor", self.factor, above=1.0)
        if self.initial is not None:
            check_number("Escalating: initial", self.initial, positive=True, otherwise="None for an estimate")

    @property
    def uses_start(self) -> bool:
        return self.solver.uses_start

    @property
    def tolerance(self) -> float | None:
        return self.solver.tolerance

    def prepare(self, operator: Any) -> _Level:
        return _Level(self.solver.prepare(operator))

    def memory_of(self, state: _Level) -> dict[str, Any]:
        return self.solver.memory_of(state.state)

    def remember(self, state: _Level, memory: Mapping[str, Any]) -> None:
        self.solver.remember(state.state, memory)

    def _solve(self, operator: LinearOperator, b: Params, x0: Params | None, state: _Level) -> Solution:
        counted, before = CountedOperator(operator), (state.state, state.tikhonov)
        made = [self._attempt(counted, b, x0, state)]
        while made[-1].status in _BREAKDOWNS and len(made) <= self.attempts:
            state.tikhonov = self._next_tikhonov(counted, b, made[-1], state.tikhonov)
            state.state = self.solver.prepare(TikhonovOperator(counted, state.tikhonov))
            made.append(self._attempt(counted, b, x0, state))
        chosen = made[-1]
        if chosen.status in _BREAKDOWNS:
            chosen, (state.state, state.tikhonov) = made[0], before
        without = None
        if state.tikhonov > 0.0:
            without = float(tree.norm(residual(counted, b, chosen.value)) / tree.norm(b))
        return replace(
            chosen,
            num_hvps=counted.products,
            min_curvature=min((s.min_curvature for s in made if s.min_curvature is not None), default=None),
            ritz_range=union_of_ranges([s.ritz_range for s in made]),
            tikhonov=state.tikhonov,
            residual_without_tikhonov=without,
        )

    def _attempt(self, operator: LinearOperator, b: Params, x0: Params | None, level: _Level) -> Solution:
        """One solve, its eigenvalue estimates those of A."""
        tikhonov = level.tikhonov
        if tikhonov > 0.0:
            operator = TikhonovOperator(operator, tikhonov)
        found = self.solver.solve(operator, b, x0=x0, state=level.state)
        low, ritz = found.min_curvature, found.ritz_range
        return replace(
            found,
            min_curvature=None if low is None else low - tikhonov,
            ritz_range=None if ritz is None else (ritz[0] - tikhonov, ritz[1] - tikhonov),
        )

    def _next_tikhonov(self, operator: LinearOperator, b: Params, failed: Solution, tikhonov: float) -> float:
        if tikhonov > 0.0:
            return self.factor * tikhonov
        if self.initial is not None:
            return self.initial
        values = failed.ritz_range or ritz_values(operator, b, _LANCZOS_STEPS)
        low = min(values[0], math.inf if failed.min_curvature is None else failed.min_curvature)
        size = max(-low, values[-1])
        return max(-2.0 * low, _SMALLEST_PART * size) if 0.0 < size < math.inf else 1.0
