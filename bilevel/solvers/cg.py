"""Conjugate gradients, global, layer-wise and preconditioned."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel import tree
from bilevel.operators import LinearOperator
from bilevel.solution import Solution, Status
from bilevel.solvers.account import Account, CountedOperator
from bilevel.solvers.base import Solver, check_iterations
from bilevel.solvers.lanczos import conjugate_block, ritz_range
from bilevel.solvers.preconditioner import Inverse, Preconditioner
from bilevel.tree import Params


@dataclass
class _Prepared:
    """The preconditioner, made at the first right-hand side, which gives the shapes."""

    inverse: Inverse | None = None


@final
@dataclass(frozen=True)
class CG(Solver):
    """Conjugate gradients (Hestenes and Stiefel 1952) for symmetric positive definite A.

    Args:
        max_iterations: at most this many iterations, one product each.
        rtol: stop once ``||b - A x|| <= rtol ||b||``; None makes exactly max_iterations (status BUDGET). Either way the
            solve ends early where the residual has reached the rounding level, below which no iteration helps.
        layerwise: take step lengths and conjugation coefficients per leaf while the product stays the full one. This
            is the variant that BiSSL's authors use (appendix B.3). It is *not* an exact solver: where it converges, it
            converges to ``A x = b + sum_i [A, D_i] d_i`` with D_i the block-diagonal matrix of step lengths, which is
            biased unless A is block-diagonal.
        preconditioner: a symmetric positive definite approximation of A, made once for a state and kept for every
            right-hand side, its products counted in the first solve. The stopping rule stays on the residual itself.

    The residual of the recursion is the true one up to rounding for the global method, and is measured by one more
    product wherever rounding or an inexact operator could matter; if it turns out above rtol, iterations go on from
    it. In the layer-wise method the recursion's vector is not the residual, so the true one is always measured at the
    end, by one more product, and decides the status.

    Raises:
        ValueError: max_iterations < 1, rtol outside [0, 1), a preconditioner together with layerwise; at solve, a
            preconditioner that is not positive definite.
        TypeError: a preconditioner that is not a `Preconditioner`.
    """

    max_iterations: int = 10
    rtol: float | None = 1e-3
    layerwise: bool = False
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        check_iterations("CG", self.max_iterations, self.rtol)
        if self.preconditioner is not None and not isinstance(self.preconditioner, Preconditioner):
            raise TypeError(
                f"CG: preconditioner must be a Preconditioner or None, got {type(self.preconditioner).__name__}"
            )
        if self.preconditioner is not None and self.layerwise:
            raise ValueError("CG: layerwise=True takes no preconditioner; leave one of the two out")

    def prepare(self, operator: Any) -> _Prepared | None:
        return None if self.preconditioner is None else _Prepared()

    def _solve(self, operator: LinearOperator, b: Params, x0: Params | None, state: _Prepared | None) -> Solution:
        products, inverse = 0, None
        if self.preconditioner is not None:
            assert state is not None
            if state.inverse is None:
                counted = CountedOperator(operator)
                state.inverse = self.preconditioner.prepare(counted, b)
                products = counted.products
            if state.inverse is None:
                return Solution(b, Status.NON_FINITE, (1.0, math.nan), 0, products)
            inverse = state.inverse
        account = Account(operator, b, self.max_iterations, self.rtol, products)
        r = b if x0 is None else account.residual(x0)
        start = account.relative(r)
        if operator.agree(not math.isfinite(start)):
            return account.close(Status.NON_FINITE, b, (start, math.nan))
        run = ConjugateGradients(account, layerwise=self.layerwise, inverse=inverse)
        return run.solve(x0, r, start)


class ConjugateGradients:
    """One run: the textbook's x, r, z = M^-1 r, d and what must be known to report on them."""

    def __init__(self, account: Account, *, layerwise: bool = False, inverse: Inverse | None = None) -> None:
        self.account, self.layerwise, self.inverse = account, layerwise, inverse
        self.earlier_iterations = account.iterations
        self.blocks: list[tuple[list[Tensor], list[Tensor]]] = []

    def solve(self, x0: Params | None, r: Params, start: float) -> Solution:
        """Iterates from x0, or from 0 without one, where the residual is r, of relative norm `start`."""
        account, b = self.account, self.account.b
        self.from_zero = x0 is None
        x = tree.zeros_like(b) if x0 is None else x0
        relative = start
        while True:
            x, relative, breakdown = self._iterate(x, r, relative, start)
            no_step = breakdown is not None and self._at_zero
            x = b if no_step else x
            if no_step or self.layerwise or account.drifted(x, relative):
                r = account.residual(x)
                relative = account.relative(r)
            # Directions made of nothing but rounding errors have arbitrary curvature: no breakdown once x is as good
            # as it can get.
            settled = account.settled(x, relative)
            if breakdown is not None and not (settled and breakdown is not Status.NON_FINITE):
                return account.close(breakdown, x, (start, relative), self._ritz_range())
            stop = settled or not account.unfinished(relative)
            if stop or self.layerwise or not math.isfinite(relative):
                verdict = account.verdict(relative, settled)
                return account.close(verdict, x, (start, relative), self._ritz_range())

    @property
    def _at_zero(self) -> bool:
        return self.from_zero and self.account.iterations == self.earlier_iterations

    def _iterate(self, x: Params, r: Params, relative: float, start: float) -> tuple[Params, float, Status | None]:
        """Iterates from x with residual r; after a breakdown the iterate of smallest residual among those made."""
        account, operator = self.account, self.account.operator
        z = self._precondition(r)
        d, rho = z, self._inner(r, z)
        pivots, conjugations = self._new_block()
        # Zero, the start without an x0, is never kept as the best.
        best, best_relative = x, math.inf if self._at_zero else relative
        while account.unfinished(relative):
            product = operator(d)
            verdict, energy = self._look(d, product, rho)
            if isinstance(rho, Tensor):
                pivots.append(energy / rho)
            if operator.agree(verdict is not None):
                return best, min(best_relative, relative), verdict or Status.NON_FINITE
            alpha = _ratio(rho, self._inner(d, product) if self.layerwise else energy)
            x = tree.axpy(alpha, d, x)
            r = tree.axpy(_negative(alpha), product, r)
            relative = account.relative(r)
            if operator.agree(not math.isfinite(relative)):
                return best, best_relative, Status.NON_FINITE
            account.curve.append(relative)
            if relative <= best_relative:
                best, best_relative = x, relative
            if relative > start / math.sqrt(account.rounding):
                return best, best_relative, Status.DIVERGED
            z = self._precondition(r)
            new_rho = self._inner(r, z)
            beta = _ratio(new_rho, rho)
            if isinstance(beta, Tensor):
                conjugations.append(beta)
            d = tree.axpy(beta, d, z)
            rho = new_rho
        return x, relative, None

    def _look(self, d: Params, product: Params, rho: Tensor | Params) -> tuple[Status | None, Tensor]:
        """What the direction d says about A, and d'Ad."""
        dd, energy = tree.dot(d, d), tree.dot(d, product)
        readings = [energy / dd, tree.norm(product) / dd.sqrt()]
        if self.inverse is not None:
            assert isinstance(rho, Tensor)
            readings.append(rho)
        curvature, gain, *rest = torch.stack(readings).tolist()
        if any(value <= 0.0 for value in rest):
            raise ValueError(
                f"preconditioner: r'M^-1 r = {rest[0]:.3g} for a residual r that is not 0; M must be symmetric "
                "positive definite"
            )
        return self.account.meet(curvature, gain), energy

    def _precondition(self, r: Params) -> Params:
        return r if self.inverse is None else self.inverse(r)

    def _inner(self, x: Params, y: Params) -> Tensor | Params:
        return tree.leaf_dots(x, y) if self.layerwise else tree.dot(x, y)

    def _new_block(self) -> tuple[list[Tensor], list[Tensor]]:
        self.blocks.append(([], []))
        return self.blocks[-1]

    def _ritz_range(self) -> tuple[float, float] | None:
        """None where the coefficients are not those of A in the Euclidean inner product."""
        if self.layerwise or self.inverse is not None:
            return None
        return ritz_range(conjugate_block(*block) for block in self.blocks)


def _ratio(numerator: Tensor | Params, denominator: Tensor | Params) -> Tensor | Params:
    """Coefficient of a step; per leaf, 0 where a leaf has nothing to do (both zero)."""
    if isinstance(numerator, Mapping):
        assert isinstance(denominator, Mapping)
        return {
            name: torch.where(denominator[name] == 0.0, 0.0, value / denominator[name])
            for name, value in numerator.items()
        }
    assert isinstance(denominator, Tensor)
    return numerator / denominator


def _negative(alpha: Tensor | Params) -> Tensor | Params:
    return {name: -value for name, value in alpha.items()} if isinstance(alpha, Mapping) else -alpha
