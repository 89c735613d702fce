"""Minimal residuals for symmetric indefinite systems."""

import math
from dataclasses import dataclass
from typing import Any, final

import torch

from bilevel import tree
from bilevel.linear.account import Account
from bilevel.linear.lanczos import ritz_range
from bilevel.linear.operators import LinearOperator
from bilevel.linear.solution import Solution, Status
from bilevel.linear.solver import Solver, check_iterations, is_null
from bilevel.tree import Params


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

    def _iterate(self, x: Params, r: Params, relative: float) -> tuple[Params, float, Status | None]:
        """One Lanczos run from x with residual r, until it is good enough, ends or breaks down."""
        account, operator = self.account, self.account.operator
        beta = phi = float(tree.norm(r))
        v, v_old = tree.scale(1.0 / beta, r) if beta > 0.0 else r, None
        w, w_old = None, None
        beta, cosine, sine, older_cosine, older_sine = 0.0, 1.0, 0.0, 1.0, 0.0
        diagonal, off_diagonal = self._new_block()
        while account.unfinished(relative):
            v_new, alpha, beta_new = self._lanczos_step(v, v_old, beta)
            # The new column (beta, alpha, beta_new) of the tridiagonal matrix, turned by the last two rotations.
            epsilon, delta_bar = older_sine * beta, older_cosine * beta
            delta, gamma_bar = cosine * delta_bar + sine * alpha, cosine * alpha - sine * delta_bar
            verdict = self._classify(alpha, (beta, beta_new), cosine, gamma_bar)
            if math.isfinite(alpha):
                diagonal.append(alpha)
                off_diagonal.append(beta_new)
            if operator.agree(verdict is not None):
                return x, relative, verdict or Status.NON_FINITE
            gamma = math.hypot(gamma_bar, beta_new)
            older_cosine, older_sine, cosine, sine = cosine, sine, gamma_bar / gamma, beta_new / gamma
            w, w_old = _direction(v, w, w_old, (gamma, delta, epsilon)), w
            x = tree.axpy(cosine * phi, w, x)
            phi = -sine * phi
            self.smallest_pivot = min(self.smallest_pivot, gamma)
            relative = abs(phi) / account.norm_b
            account.curve.append(relative)
            if beta_new <= 10.0 * account.product_error * account.norm_a:
                break
            v, v_old, beta = tree.scale(1.0 / beta_new, v_new), v, beta_new
        return x, relative, None

    def _lanczos_step(self, v: Params, v_old: Params | None, beta: float) -> tuple[Params, float, float]:
        """``A v - alpha v - beta v_old`` with ``alpha = v'Av``, and its norm; one product."""
        product = self.account.operator(v)
        alpha = tree.dot(v, product)
        rest = tree.axpy(-alpha, v, product)
        if v_old is not None:
            rest = tree.axpy(-beta, v_old, rest)
        readings = torch.stack([alpha, tree.norm(rest)]).tolist()
        return rest, readings[0], readings[1]

    def _classify(self, alpha: float, betas: tuple[float, float], cosine: float, gamma_bar: float) -> Status | None:
        """What the Lanczos vector v and the residual r before this step say about A.

        ``||A v||^2 = alpha^2 + beta^2 + beta_new^2``, ``r'Ar = c gamma_bar r'r`` and
        ``||A r||^2 = (gamma_bar^2 + c^2 beta_new^2) ||r||^2`` with c the cosine of the rotation before.
        """
        account = self.account
        if not (math.isfinite(alpha) and math.isfinite(betas[1])):
            return Status.NON_FINITE
        account.meet(alpha, math.hypot(alpha, *betas))
        curvature, gain = cosine * gamma_bar, math.hypot(gamma_bar, cosine * betas[1])
        account.meet(curvature, gain)
        return Status.INCONSISTENT if is_null(curvature, gain, account.norm_a, account.product_error) else None

    def _must_measure(self, x: Params, relative: float) -> bool:
        account, suspect = self.account, self._rounding() > 0.1 * relative
        # A Lanczos run that ended early is measured too, since another one would start from the residual.
        return suspect or account.unfinished(relative) or account.drifted(x, relative)

    def _rounding(self) -> float:
        """How far rounding may take the recursion's residual from the true one: ``k eps cond(A)^2``."""
        condition = self.account.norm_a / self.smallest_pivot
        return self.account.iterations * self.account.rounding * condition**2

    def _new_block(self) -> tuple[list[float], list[float]]:
        self.blocks.append(([], []))
        return self.blocks[-1]


def _lift(x: Params, x0: Params | None, r: Params) -> Params:
    """x without the part of ``x - x0`` along r, a null vector that holds all of it that A does not see."""
    moved = x if x0 is None else tree.sub(x, x0)
    return tree.axpy(-tree.dot(moved, r) / tree.dot(r, r), r, x)


def _direction(v: Params, w: Params | None, w_old: Params | None, column: tuple[float, float, float]) -> Params:
    """``(v - delta w - epsilon w_old) / gamma``."""
    gamma, delta, epsilon = column
    if w is not None:
        v = tree.axpy(-delta, w, v)
    if w_old is not None:
        v = tree.axpy(-epsilon, w_old, v)
    return tree.scale(1.0 / gamma, v)
