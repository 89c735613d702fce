"""The fixed-point iteration of the adjoint system."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from bilevel import tree
from bilevel.linear.account import Account
from bilevel.linear.operators import LinearOperator
from bilevel.linear.solution import Solution, Status
from bilevel.linear.solver import Solver, check_iterations, reads_are_free
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

    On a GPU a fixed budget (rtol=None) is made without a synchronisation between the first and the last product: a
    breakdown freezes the iterate there and is read at the end, so that all products of the budget are made.

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
        loop = _watched if self.rtol is not None or reads_are_free(b) else _unwatched
        first = x, relative if x0 is not None else math.inf
        x, relative, (best, best_relative), broken = loop(account, x, r, start, first)
        if broken:
            value, least = (b, math.nan) if math.isinf(best_relative) else (best, best_relative)
            return account.close(Status.NON_FINITE, value, (start, least))
        at_rounding = account.at_rounding_level(x, relative)
        if relative > start and not at_rounding and not account.good_enough(relative):
            return account.close(Status.DIVERGED, best, (start, best_relative))
        return account.close(account.verdict(relative, at_rounding), x, (start, relative))


_Iterate = tuple[Params, float]
"""x and its relative residual."""

_End = tuple[Params, float, _Iterate, bool]
"""The last iterate and its relative residual, the best one, and whether a number was not finite."""


def _watched(account: Account, x: Params, r: Params, start: float, best: _Iterate) -> _End:
    """Reads every iteration's numbers in one transfer, and stops where they say so."""
    relative = start
    while account.unfinished(relative) and relative <= _hopeless(start):
        x, r, readings = _step(account, x, r)
        relative = _take(account, x, readings.tolist())
        if account.operator.agree(not math.isfinite(relative)):
            return x, relative, best, True
        if relative <= best[1]:
            best = x, relative
        if account.at_rounding_level(x, relative):
            break
    return x, relative, best, False


def _unwatched(account: Account, x: Params, r: Params, start: float, best: _Iterate) -> _End:
    """All iterations of the budget; where the watched ones would stop x is frozen, and all is read at the end."""
    if not account.unfinished(start):
        return x, start, best, False
    relative, rows, exact = start, [], account.operator.exact
    alive = torch.ones_like(tree.norm(r), dtype=torch.bool)
    best_x, least = best[0], torch.full_like(tree.norm(r), best[1])
    gain = torch.full_like(least, account.norm_a)
    for _ in range(account.max_iterations):
        ahead, residual, readings = _step(account, x, r)
        now, image, size = readings.unbind()
        now = now / account.norm_b
        sound = alive & torch.isfinite(now)
        x, r = tree.where(sound, ahead, x), tree.where(sound, residual, r)
        better = sound & (now <= least)
        best_x, least = tree.where(better, ahead, best_x), torch.where(better, now, least)
        rows.append(torch.cat([readings, alive.to(readings).reshape(1)]))
        gain = torch.fmax(gain, image / size)
        attainable = account.rounding * (1.0 + gain * size / account.norm_b)
        alive = sound & (now <= _hopeless(start)) & (now > account.rounding)
        alive = alive & (now > 10.0 * attainable) if exact else alive
    for *numbers, was_alive in torch.stack(rows).tolist():
        if was_alive:
            relative = _take(account, x, numbers)
            best = (best_x, relative) if relative <= best[1] else best
    return x, relative, best, account.operator.agree(not math.isfinite(relative))


def _step(account: Account, x: Params, r: Params) -> tuple[Params, Params, Tensor]:
    """x and its residual after one more iteration; the norms of the residual, of A x and of x."""
    x = tree.add(x, r)
    r = account.residual(x)
    return x, r, torch.stack([tree.norm(r), tree.norm(tree.sub(account.b, r)), tree.norm(x)])


def _take(account: Account, x: Params, numbers: Sequence[float]) -> float:
    """Take note of an iteration's numbers; the relative residual."""
    remainder, image, size = numbers
    account.sized(x, size)
    account.norm_a = max(account.norm_a, image / size if size > 0.0 else 0.0)
    account.curve.append(remainder / account.norm_b)
    return account.curve[-1]


def _hopeless(start: float) -> float:
    return _HOPELESS * max(start, 1.0)
