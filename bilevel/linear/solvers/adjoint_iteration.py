"""The fixed-point iteration of the adjoint system."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, final

from bilevel import tree
from bilevel.linear.account import Account
from bilevel.linear.operators import LinearOperator
from bilevel.linear.solution import Solution, Status
from bilevel.linear.solver import Solver, check_iterations
from bilevel.tree import Params

_HOPELESS = 1e6
"""A residual that has grown this much has left what transient growth of a contraction explains."""


@final
@dataclass(frozen=True)
class AdjointIteration(Solver):
    r"""The iteration :math:`x \leftarrow x + (b - A x)`; for a fixed point, whose A is :math:`I - (\partial T/\partial
    y)^\top`, that is the adjoint of its own iteration,

    .. math:: w \leftarrow b + \Big(\frac{\partial T}{\partial y}\Big)^{\!\top} w

    (Grazzi, Franceschi, Pontil and Salzo 2020, algorithm 1; for recurrent networks Almeida 1987 and Pineda 1987).

    It converges where the spectral radius of dT/dy is below 1, as the lower iteration does and at its rate. Elsewhere
    it ends DIVERGED, and `GMRES` solves. The residual may grow for a while even where it converges (A is not normal):
    it is DIVERGED where it is above the first one after all iterations, or a million times it before. A need not be
    symmetric.

    Args:
        max_iterations: at most this many iterations, one product each, beside the one that measures the start of x0.
        rtol: stop once ``||b - A x|| <= rtol ||b||``; None makes exactly max_iterations (status BUDGET).

    Raises:
        ValueError: max_iterations < 1 or rtol outside [0, 1).
    """

    max_iterations: int = 50
    rtol: float | None = 1e-3
    needs_symmetric: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_iterations("AdjointIteration", self.max_iterations, self.rtol)

    @property
    def tolerance(self) -> float | None:
        return self.rtol

    def _solve(self, operator: LinearOperator, b: Params, x0: Params | None, state: Any) -> Solution:
        account = Account(operator, b, self.max_iterations, self.rtol)
        # The first step from zero needs no product: it leads to b.
        x, r = (tree.zeros_like(b), b) if x0 is None else (x0, account.residual(x0))
        start = relative = account.relative(r)
        if operator.agree(not math.isfinite(start)):
            return account.close(Status.NON_FINITE, b, (start, math.nan))
        best, best_relative = x, relative if x0 is not None else math.inf
        while account.unfinished(relative) and relative <= _HOPELESS * max(start, 1.0):
            x = tree.add(x, r)
            r = account.residual(x)
            relative = account.relative(r)
            account.norm_a = max(account.norm_a, _gain(account, x, r))
            account.curve.append(relative)
            if operator.agree(not math.isfinite(relative)):
                broken = (b, math.nan) if math.isinf(best_relative) else (best, best_relative)
                return account.close(Status.NON_FINITE, broken[0], (start, broken[1]))
            if relative <= best_relative:
                best, best_relative = x, relative
            if account.at_rounding_level(x, relative):
                break
        at_rounding = account.at_rounding_level(x, relative)
        if relative > start and not at_rounding and not account.good_enough(relative):
            return account.close(Status.DIVERGED, best, (start, best_relative))
        return account.close(account.verdict(relative, at_rounding), x, (start, relative))


def _gain(account: Account, x: Params, r: Params) -> float:
    """``||A x|| / ||x||`` from the residual that is known."""
    size = float(tree.norm(x))
    return float(tree.norm(tree.sub(account.b, r))) / size if size > 0.0 else 0.0
