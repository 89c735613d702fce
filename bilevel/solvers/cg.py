"""Conjugate gradients, global and layer-wise."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel import tree
from bilevel.operators import LinearOperator
from bilevel.solution import Solution, Status
from bilevel.solvers.base import (
    Solver,
    attainable,
    check_iterations,
    classify_curvature,
    product_error,
    residual,
    rounding_unit,
)
from bilevel.tree import Params


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

    The residual of the recursion is the true one up to rounding for the global method, and is measured by one more
    product wherever rounding or an inexact operator could matter; if it turns out above rtol, iterations go on from
    it. In the layer-wise method the recursion's vector is not the residual, so the true one is always measured at the
    end, by one more product, and decides the status.

    Raises:
        ValueError: max_iterations < 1 or rtol outside [0, 1).
    """

    max_iterations: int = 10
    rtol: float | None = 1e-3
    layerwise: bool = False

    def __post_init__(self) -> None:
        check_iterations("CG", self.max_iterations, self.rtol)

    def _solve(self, operator: LinearOperator, b: Params, x0: Params | None, state: Any) -> Solution:
        return _Run(self, operator, b, x0).solve()


class _Run:
    """One solve: the textbook's x, r, d and what must be known to report on them."""

    def __init__(self, options: CG, operator: LinearOperator, b: Params, x0: Params | None) -> None:
        self.options, self.operator, self.b, self.x0 = options, operator, b, x0
        self.norm_b = float(tree.norm(b))
        self.rounding, self.product_error = rounding_unit(b), product_error(operator, b)
        self.iterations = self.products = 0
        self.min_curvature: float | None = None
        self.norm_a = 0.0

    def solve(self) -> Solution:
        x = tree.zeros_like(self.b) if self.x0 is None else self.x0
        r = self.b if self.x0 is None else self._residual(x)
        start = relative = self._relative(r)
        if self.operator.agree(not math.isfinite(start)):
            return self._finish(Status.NON_FINITE, self.b, (start, math.nan))
        while True:
            x, relative, breakdown = self._iterate(x, r, relative, start)
            no_step = breakdown is not None and self.iterations == 0 and self.x0 is None
            x = self.b if no_step else x
            if no_step or self._must_measure(x, relative):
                r = self._residual(x)
                relative = self._relative(r)
            # Directions made of nothing but rounding errors have arbitrary curvature: no breakdown once x is as good
            # as it can get.
            settled = self.operator.exact and relative <= 10.0 * self._attainable(x)
            if breakdown is not None and not (settled and breakdown is not Status.NON_FINITE):
                return self._finish(breakdown, x, (start, relative))
            stop = settled or self._good_enough(relative) or self.iterations >= self.options.max_iterations
            if stop or self.options.layerwise or not math.isfinite(relative):
                return self._finish(self._verdict(relative, settled), x, (start, relative))

    def _iterate(self, x: Params, r: Params, relative: float, start: float) -> tuple[Params, float, Status | None]:
        """Iterates from x with residual r; after a breakdown the iterate of smallest residual among those made."""
        d, rho = r, self._inner(r, r)
        # Zero, the start without an x0, is never kept as the best.
        best, best_relative = x, math.inf if self.iterations == 0 and self.x0 is None else relative
        while self.iterations < self.options.max_iterations and not self._good_enough(relative):
            product = self.operator(d)
            self.products += 1
            dd = tree.dot(d, d)
            curvature, gain = torch.stack([tree.dot(d, product) / dd, tree.norm(product) / dd.sqrt()]).tolist()
            self.norm_a = max(self.norm_a, gain if math.isfinite(gain) else 0.0)
            verdict = classify_curvature(curvature, gain, self.norm_a, self.product_error)
            if math.isfinite(curvature):
                self.min_curvature = curvature if self.min_curvature is None else min(self.min_curvature, curvature)
            if self.operator.agree(verdict is not None):
                return best, min(best_relative, relative), verdict or Status.NON_FINITE
            alpha = _ratio(rho, self._inner(d, product))
            x = tree.axpy(alpha, d, x)
            r = tree.axpy(_negative(alpha), product, r)
            relative = self._relative(r)
            if self.operator.agree(not math.isfinite(relative)):
                return best, best_relative, Status.NON_FINITE
            self.iterations += 1
            if relative <= best_relative:
                best, best_relative = x, relative
            if relative > start / math.sqrt(self.rounding):
                return best, best_relative, Status.DIVERGED
            new_rho = self._inner(r, r)
            d = tree.axpy(_ratio(new_rho, rho), d, r)
            rho = new_rho
        return x, relative, None

    def _must_measure(self, x: Params, relative: float) -> bool:
        """Whether the recursion's residual may differ from the true one by more than a tenth."""
        if self.options.layerwise or not self.operator.exact:
            return True
        return max(self.iterations, 1) * self._attainable(x) > 0.1 * relative

    def _attainable(self, x: Params) -> float:
        return attainable(self.norm_a, x, self.norm_b, self.rounding)

    def _inner(self, x: Params, y: Params) -> Tensor | Params:
        return tree.leaf_dots(x, y) if self.options.layerwise else tree.dot(x, y)

    def _residual(self, x: Params) -> Params:
        self.products += 1
        return residual(self.operator, self.b, x)

    def _relative(self, r: Params) -> float:
        return float(tree.norm(r)) / self.norm_b

    def _good_enough(self, relative: float) -> bool:
        return relative <= max(self.options.rtol or 0.0, self.rounding)

    def _verdict(self, relative: float, settled: bool) -> Status:
        if not math.isfinite(relative):
            return Status.NON_FINITE
        if self.options.rtol is None:
            # A layer-wise recursion may run out of residual early, at a point that solves another system.
            early = self.iterations < self.options.max_iterations
            return Status.CONVERGED if early and (settled or self._good_enough(relative)) else Status.BUDGET
        return Status.CONVERGED if relative <= self.options.rtol else Status.NOT_CONVERGED

    def _finish(self, status: Status, x: Params, residuals: tuple[float, float]) -> Solution:
        return Solution(x, status, residuals, self.iterations, self.products, self.min_curvature)


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
