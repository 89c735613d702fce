"""Minimal residuals for symmetric indefinite systems."""

import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel import tree
from bilevel.linear.account import Account
from bilevel.linear.lanczos import ritz_range
from bilevel.linear.operators import LinearOperator
from bilevel.linear.solution import Solution, Status
from bilevel.linear.solver import Solver, check_iterations, is_null, reads_are_free
from bilevel.tree import Params

_End = tuple[Params, float, Status | None]
"""The last iterate, its relative residual by the recursion, and a breakdown."""


@final
@dataclass(frozen=True)
class MINRES(Solver):
    """Minimal residuals (Paige and Saunders 1975) for symmetric A, definite or not.

    The iterate x_k minimizes ``||b - A x||`` over ``x0 + span{r, A r, ..., A^(k-1) r}``, so that the residual never
    grows and negative curvature is no failure; it is reported as `min_curvature`. In a singular system whose
    right-hand side is not in the range of A, the residual ends as a null vector: the status is INCONSISTENT and the
    value the least-squares solution nearest to x0, the one of least norm without an x0 (lifted along the residual: Liu,
    Milzarek and Roosta 2023), to the square root of the rounding unit. Takes about six vectors of memory.

    Args:
        max_iterations: at most this many iterations, one product each.
        rtol: stop once ``||b - A x|| <= rtol ||b||``; None makes exactly max_iterations (status BUDGET). Either way the
            solve ends early where the residual has reached the rounding level.

    The residual's norm follows from the Givens rotations, and is measured by one more product wherever rounding
    (which enters with the square of A's condition number: Sleijpen, van der Vorst and Modersitzki 2000) or an inexact
    operator could matter; if it turns out above rtol, iterations start again from it. Where no iteration lowers the
    residual of 0, b is given back, never 0.

    On a GPU a fixed budget (rtol=None) is made without a synchronisation between the first and the last product: a
    breakdown freezes the iterate there and is read at the end, so that all products of the budget are made.

    Raises:
        ValueError: max_iterations < 1 or rtol outside [0, 1).
    """

    max_iterations: int = 10
    rtol: float | None = 1e-3

    def __post_init__(self) -> None:
        check_iterations("MINRES", self.max_iterations, self.rtol)

    @property
    def tolerance(self) -> float | None:
        return self.rtol

    def _solve(self, operator: LinearOperator, b: Params, x0: Params | None, state: Any) -> Solution:
        return _MinimalResiduals(Account(operator, b, self.max_iterations, self.rtol)).solve(x0)


class _MinimalResiduals:
    """One solve, of one Lanczos run or of several where the measured residual asks for another."""

    def __init__(self, account: Account) -> None:
        self.account = account
        self.blocks: list[tuple[list[float], list[float]]] = []
        self.smallest_pivot = math.inf

    def solve(self, x0: Params | None) -> Solution:
        account, b = self.account, self.account.b
        x = tree.zeros_like(b) if x0 is None else x0
        r = b if x0 is None else account.residual(x)
        start = relative = account.relative(r)
        if account.operator.agree(not math.isfinite(start)):
            return account.close(Status.NON_FINITE, b, (start, math.nan))
        best, best_relative = x, start
        while True:
            made = account.iterations
            x, estimate, breakdown = self._iterate(x, r, relative)
            relative, made = estimate, account.iterations - made
            if made and breakdown is not Status.NON_FINITE and self._must_measure(x, relative):
                r = account.residual(x)
                relative = account.relative(r)
                if breakdown is Status.INCONSISTENT and relative > 2.0 * estimate:
                    # What the recursion took for a null vector is not the residual.
                    breakdown = None
            if relative <= best_relative:
                best, best_relative = x, relative
            at_rounding = account.at_rounding_level(x, relative)
            stop = at_rounding or not account.unfinished(relative) or not math.isfinite(relative)
            if stop or breakdown is not None:
                break
        if not math.isfinite(relative):
            breakdown = Status.NON_FINITE
        if breakdown is None or (at_rounding and breakdown is not Status.NON_FINITE):
            grown = relative > start * (1.0 + math.sqrt(account.product_error)) and not at_rounding
            # Beyond what rounding explains, the operator is not the symmetric linear one that it should be.
            explained = account.rtol is not None and relative <= start + self._rounding()
            breakdown = Status.DIVERGED if grown and not explained else account.verdict(best_relative, at_rounding)
        if breakdown is Status.INCONSISTENT and account.iterations:
            best = _lift(x, x0, r)
            best_relative = account.relative(account.residual(best))
        if x0 is None and best_relative > 1.0 - math.sqrt(account.product_error):
            best = b
            best_relative = account.relative(account.residual(b))
        return account.close(breakdown, best, (start, best_relative), ritz_range(self.blocks))

    def _iterate(self, x: Params, r: Params, relative: float) -> _End:
        """One Lanczos run from x with residual r, until it is good enough, ends or breaks down."""
        self.blocks.append(([], []))
        watched = self.account.rtol is not None or reads_are_free(r)
        return (self._watched if watched else self._unwatched)(x, r, relative)

    def _watched(self, x: Params, r: Params, relative: float) -> _End:
        """Reads every iteration's numbers in one transfer, and stops where they say so."""
        account, turns = self.account, _Rotations(float(tree.norm(r)))
        v, v_old = tree.scale(1.0 / turns.phi, r) if turns.phi > 0.0 else r, None
        w, w_old = None, None
        while account.unfinished(relative):
            v_new, readings = self._lanczos_step(v, v_old, turns.beta)
            alpha, beta = readings.tolist()
            verdict = self._judge(turns, alpha, beta)
            if account.operator.agree(verdict is not None):
                return x, relative, verdict or Status.NON_FINITE
            column = turns.turn(alpha, beta)
            w, w_old = _direction(v, w, w_old, column), w
            x = tree.axpy(turns.step, w, x)
            relative = self._note(turns, column[0])
            if self._exhausted(beta):
                break
            v, v_old = tree.scale(1.0 / beta, v_new), v
        return x, relative, None

    def _unwatched(self, x: Params, r: Params, relative: float) -> _End:
        """All iterations of the budget; where the watched ones would stop x is frozen, and all is read at the end."""
        account, error, norm = self.account, self.account.product_error, tree.norm(r)
        turns, alive, rows = _Rotations(tree.wide(norm)), torch.ones_like(norm, dtype=torch.bool), []
        scale = torch.full_like(norm, account.norm_a, dtype=tree.widest(norm.device))
        v, v_old = tree.scale(1.0 / norm, r), None
        w, w_old = None, None
        for _ in range(account.max_iterations - account.iterations):
            v_new, readings = self._lanczos_step(v, v_old, turns.beta)
            alpha, beta = tree.wide(readings).unbind()
            (curvature, gain), size = turns.of_residual(alpha, beta), _length(_length(alpha, turns.beta), beta)
            scale = torch.fmax(torch.fmax(scale, size), gain)
            null = (curvature.abs() <= 4.0 * error * scale) & (gain <= 4.0 * math.sqrt(error) * scale)
            sound = alive & torch.isfinite(readings).all() & ~null
            column = turns.turn(alpha, beta)
            w, w_old = _direction(v, w, w_old, column), w
            x = tree.where(sound, tree.axpy(turns.step, w, x), x)
            rows.append(torch.stack([alpha, beta, alive, sound]))
            good = (turns.phi.abs() <= account.rounding * account.norm_b) | (beta <= 10.0 * error * scale)
            alive = sound & ~good
            v, v_old = tree.scale(1.0 / beta, v_new), v
        turns = _Rotations(relative * account.norm_b)
        for alpha, beta, was_alive, was_sound in torch.stack(rows).tolist() if rows else []:
            verdict = self._judge(turns, alpha, beta) if was_alive else None
            if verdict is not None or (was_alive and not was_sound):
                return x, relative, verdict or Status.NON_FINITE
            if was_alive:
                relative = self._note(turns, turns.turn(alpha, beta)[0])
        return x, relative, None

    def _lanczos_step(self, v: Params, v_old: Params | None, beta: float | Tensor) -> tuple[Params, Tensor]:
        """``A v - alpha v - beta v_old`` with ``alpha = v'Av``; this and its norm; one product."""
        product = self.account.operator(v)
        alpha = tree.dot(v, product)
        rest = tree.axpy(-alpha, v, product)
        if v_old is not None:
            rest = tree.axpy(-beta, v_old, rest)
        return rest, torch.stack([alpha, tree.norm(rest)])

    def _judge(self, turns: "_Rotations", alpha: float, beta: float) -> Status | None:
        """What the Lanczos vector v and the residual r before this step say about A; takes note of them."""
        account, (diagonal, off_diagonal) = self.account, self.blocks[-1]
        if math.isfinite(alpha):
            diagonal.append(alpha)
            off_diagonal.append(beta)
        if not (math.isfinite(alpha) and math.isfinite(beta)):
            return Status.NON_FINITE
        # ||A v||^2 = alpha^2 + beta^2 + beta_new^2
        account.meet(alpha, math.hypot(alpha, turns.beta, beta))
        curvature, gain = turns.of_residual(alpha, beta)
        account.meet(curvature, gain)
        return Status.INCONSISTENT if is_null(curvature, gain, account.norm_a, account.product_error) else None

    def _note(self, turns: "_Rotations", pivot: float) -> float:
        """Take note of an iteration; the relative residual."""
        self.smallest_pivot = min(self.smallest_pivot, pivot)
        self.account.curve.append(abs(turns.phi) / self.account.norm_b)
        return self.account.curve[-1]

    def _exhausted(self, beta: float) -> bool:
        return beta <= 10.0 * self.account.product_error * self.account.norm_a

    def _must_measure(self, x: Params, relative: float) -> bool:
        account, suspect = self.account, self._rounding() > 0.1 * relative
        # A Lanczos run that ended early is measured too, since another one would start from the residual.
        return suspect or account.unfinished(relative) or account.drifted(x, relative)

    def _rounding(self) -> float:
        """How far rounding may take the recursion's residual from the true one: ``k eps cond(A)^2``."""
        condition = self.account.norm_a / self.smallest_pivot
        return self.account.iterations * self.account.rounding * condition**2


class _Rotations:
    """The last two Givens rotations, which turn the tridiagonal matrix into a triangular one; of numbers or of 0-d
    tensors.

    Attributes:
        phi: the residual's norm, with a sign.
        beta: the last off-diagonal entry.
        step: how far the last iteration went along its direction.
    """

    def __init__(self, phi: Any) -> None:
        self.phi, self.beta, self.step = phi, 0.0 * phi, 0.0 * phi
        self._cosine, self._sine, self._older_cosine, self._older_sine = 1.0, 0.0, 1.0, 0.0

    def turn(self, alpha: Any, beta: Any) -> tuple[Any, Any, Any]:
        """The new column (self.beta, alpha, beta) turned by both and by a third one: its last entries, from the
        diagonal upwards."""
        epsilon, delta_bar = self._older_sine * self.beta, self._older_cosine * self.beta
        delta, gamma_bar = self._cosine * delta_bar + self._sine * alpha, self._gamma_bar(alpha)
        gamma = _length(gamma_bar, beta)
        self._older_cosine, self._older_sine = self._cosine, self._sine
        self._cosine, self._sine = gamma_bar / gamma, beta / gamma
        self.step, self.phi, self.beta = self._cosine * self.phi, -self._sine * self.phi, beta
        return gamma, delta, epsilon

    def of_residual(self, alpha: Any, beta: Any) -> tuple[Any, Any]:
        """Curvature and gain of A along the residual before this column: ``r'Ar = c gamma_bar r'r`` and
        ``||A r||^2 = (gamma_bar^2 + c^2 beta^2) ||r||^2`` with c the cosine of the rotation before."""
        gamma_bar = self._gamma_bar(alpha)
        return self._cosine * gamma_bar, _length(gamma_bar, self._cosine * beta)

    def _gamma_bar(self, alpha: Any) -> Any:
        return self._cosine * alpha - self._sine * (self._older_cosine * self.beta)


def _length(x: Any, y: Any) -> Any:
    """``sqrt(x^2 + y^2)`` of numbers or of 0-d tensors."""
    return torch.hypot(x, y) if isinstance(x, Tensor) else math.hypot(x, y)


def _lift(x: Params, x0: Params | None, r: Params) -> Params:
    """x without the part of ``x - x0`` along r, a null vector that holds all of it that A does not see."""
    moved = x if x0 is None else tree.sub(x, x0)
    return tree.axpy(-tree.dot(moved, r) / tree.dot(r, r), r, x)


def _direction(v: Params, w: Params | None, w_old: Params | None, column: tuple[Any, Any, Any]) -> Params:
    """``(v - delta w - epsilon w_old) / gamma``."""
    gamma, delta, epsilon = column
    if w is not None:
        v = tree.axpy(-delta, w, v)
    if w_old is not None:
        v = tree.axpy(-epsilon, w_old, v)
    return tree.scale(1.0 / gamma, v)
