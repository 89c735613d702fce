"""Truncated Neumann series with an automatic scale."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel import tree
from bilevel.checks import check_number
from bilevel.linear.account import Account, CountedOperator
from bilevel.linear.lanczos import ritz_values
from bilevel.linear.operators import KnownProduct, LinearOperator
from bilevel.linear.solution import Solution, Status
from bilevel.linear.solver import Solver, check_iterations, reads_are_free
from bilevel.tree import Params

_End = tuple[Params, float, Status | None]
"""x, its relative residual by the recursion, and what ended the series early."""

_LANCZOS_STEPS = 5
_SAFETY = 1.1


@dataclass
class _Scale:
    """The step found for an operator at its first right-hand side, and what that cost and showed."""

    value: float | None = None
    ritz_values: tuple[float, ...] = field(default=())


@final
@dataclass(frozen=True)
class Neumann(Solver):
    r"""Neumann series :math:`x = \alpha \sum_{k=0}^{K-1} (I - \alpha A)^k b` (Lorraine et al. 2020).

    K terms leave the error :math:`(I - \alpha A)^K A^{-1} b` exactly, the same as K steps of gradient descent unrolled
    backwards from the optimum. It converges for positive definite A and :math:`\alpha < 2 / \lambda_{max}`; with
    :math:`\alpha = 1` on A = I + H/c it diverges as soon as ``||H|| > c``. The residual that grows for the first time
    ends the solve as DIVERGED: it would grow for ever.

    Args:
        max_iterations: at most this many terms K, one product each.
        rtol: stop once ``||b - A x|| <= rtol ||b||``; None makes exactly max_iterations.
        scale: alpha, or "auto" for ``1 / (1.1 theta)`` with theta the largest Ritz value in modulus after at most 5
            Lanczos steps from the first right-hand side, whose first product is that of the first term too (products
            that are counted once; the scale is kept in the state for every later one, and taken anew from one with
            which the series diverges).

    One term from a start x0, ``x0 + alpha (b - A x0)``, as stochastic methods take it from their last solution, is made
    with that one product. What it leads to is then not measured: the final residual is NaN, the status BUDGET.

    On a GPU a fixed number of terms (rtol=None) is summed without a synchronisation between the first and the last; a
    breakdown freezes the sum there and is read at the end.

    Raises:
        ValueError: max_iterations < 1, rtol outside [0, 1), a scale that is neither positive nor "auto".
    """

    max_iterations: int = 10
    rtol: float | None = None
    scale: float | str = "auto"

    def __post_init__(self) -> None:
        check_iterations("Neumann", self.max_iterations, self.rtol)
        if self.scale != "auto":
            check_number("Neumann: scale", self.scale, positive=True, otherwise="'auto'")

    @property
    def tolerance(self) -> float | None:
        return self.rtol

    def prepare(self, operator: Any) -> _Scale:
        return _Scale(None if isinstance(self.scale, str) else self.scale)

    def _solve(self, operator: LinearOperator, b: Params, x0: Params | None, state: _Scale) -> Solution:
        products, kept = 0, state.value is not None and self.scale == "auto"
        if state.value is None:
            # The series begins with the same product where it begins at zero.
            counted = CountedOperator(KnownProduct(operator, b, operator(b)))
            state.ritz_values = ritz_values(counted, b, _LANCZOS_STEPS)
            products = counted.products - (x0 is None)
            operator = counted.operator if x0 is None else operator
            largest = max((abs(value) for value in state.ritz_values), default=math.nan)
            if operator.agree(not math.isfinite(largest)):
                return Solution(b, Status.NON_FINITE, (1.0, math.nan), 0, len(state.ritz_values))
            state.value = 1.0 / (_SAFETY * largest) if largest > 0.0 else 1.0
        account = Account(operator, b, self.max_iterations, self.rtol, products)
        seen = (state.ritz_values[0], state.ritz_values[-1]) if state.ritz_values else None
        watched = self.rtol is not None or reads_are_free(b)
        found = _Series(account, state.value, watched=watched, seen=seen).sum(x0)
        if kept and found.status is Status.DIVERGED:
            # The scale is that of an earlier right-hand side, which had no part along the largest eigenvalues.
            state.value = None
            again = self._solve(operator, b, x0, state)
            return replace(again, num_hvps=again.num_hvps + found.num_hvps)
        return found


class _Series:
    """One solve: the partial sum x, its residual r, and what must be known to report on them.

    Args:
        watched: read every term's numbers at once and stop at a breakdown; otherwise none is read before the last.
        seen: smallest and largest Ritz value that came of the choice of alpha.
    """

    def __init__(
        self, account: Account, alpha: float, *, watched: bool, seen: tuple[float, float] | None = None
    ) -> None:
        self.account, self.alpha, self.watched, self.seen = account, alpha, watched, seen
        self.first_product: Params | None = None
        # Exact residuals have convex logarithms in k: one that grew once grows for ever.
        self.growth = 1.0 + (math.sqrt(account.rounding) if account.operator.exact else 0.1)

    def sum(self, x0: Params | None) -> Solution:
        account, b = self.account, self.account.b
        x = tree.zeros_like(b) if x0 is None else x0
        r = b if x0 is None else account.residual(x)
        start = relative = 1.0 if x0 is None else account.relative(r)
        if account.operator.agree(not math.isfinite(start)):
            return account.close(Status.NON_FINITE, b, (start, math.nan), self.seen)
        if x0 is not None and account.rtol is None and account.max_iterations == 1:
            return account.close(Status.BUDGET, tree.axpy(self.alpha, r, x), (start, math.nan), self.seen, iterations=1)
        loop = self._watched if self.watched else self._unwatched
        x, relative, breakdown = loop(x, r, relative)
        if breakdown is not None and account.iterations == 0 and x0 is None:
            x = b
            assert self.first_product is not None
            relative = account.relative(tree.sub(b, self.first_product))
        elif account.drifted(x, relative):
            relative = account.relative(account.residual(x))
        at_rounding = account.at_rounding_level(x, relative)
        if breakdown is None or (at_rounding and breakdown is not Status.NON_FINITE):
            breakdown = account.verdict(relative, at_rounding)
        return account.close(breakdown, x, (start, relative), self.seen)

    def _watched(self, x: Params, r: Params, relative: float) -> _End:
        """Reads every term's numbers in one transfer, and stops where they say so."""
        account = self.account
        while account.unfinished(relative):
            ahead, readings = self._term(x, r)
            numbers = readings.tolist()
            verdict = self._judge(numbers, relative)
            if account.operator.agree(verdict is not None):
                return x, relative, verdict or Status.NON_FINITE
            (x, r), relative = ahead, numbers[-1]
            account.curve.append(relative)
        return x, relative, None

    def _unwatched(self, x: Params, r: Params, relative: float) -> _End:
        """All terms of the budget; one that is not sound freezes the sum, and is read at the end."""
        account, rows = self.account, []
        last = torch.full_like(tree.norm(r), relative)
        alive, scale = torch.ones_like(last, dtype=torch.bool), torch.full_like(last, account.norm_a)
        for _ in range(account.max_iterations):
            ahead, readings = self._term(x, r)
            curvature, gain, now = readings.unbind()
            scale = torch.fmax(scale, torch.where(torch.isfinite(gain), gain, 0.0))
            sound = torch.isfinite(readings).all() & (curvature > 4.0 * account.product_error * scale)
            sound = alive & sound & (now <= last * self.growth)
            x, r, last = tree.where(sound, ahead[0], x), tree.where(sound, ahead[1], r), torch.where(sound, now, last)
            rows.append(torch.cat([readings, torch.stack([alive, sound]).to(readings)]))
            alive = sound & (now > account.rounding)
        for *numbers, was_alive, was_sound in torch.stack(rows).tolist():
            if not was_alive:
                break
            verdict = self._judge(numbers, relative)
            if verdict is not None or not was_sound:
                return x, relative, verdict or Status.NON_FINITE
            relative = numbers[-1]
            account.curve.append(relative)
        return x, relative, None

    def _term(self, x: Params, r: Params) -> tuple[tuple[Params, Params], Tensor]:
        """Sum and residual with one more term; curvature and gain of A along r, and the new relative residual."""
        product, square = self.account.operator(r), tree.dot(r, r)
        self.first_product = product if self.first_product is None else self.first_product
        ahead = tree.axpy(self.alpha, r, x), tree.axpy(-self.alpha, product, r)
        gain, relative = tree.norm(product) / square.sqrt(), tree.norm(ahead[1]) / self.account.norm_b
        return ahead, torch.stack([tree.dot(r, product) / square, gain, relative])

    def _judge(self, readings: list[float], before: float) -> Status | None:
        """What one term's numbers say; takes note of them."""
        curvature, gain, relative = readings
        verdict = self.account.meet(curvature, gain)
        if verdict is not None:
            return verdict
        if not math.isfinite(relative):
            return Status.NON_FINITE
        return Status.DIVERGED if relative > before * self.growth else None
