"""Truncated Neumann series with an automatic scale."""

import math
from dataclasses import dataclass, field
from typing import Any, final

import torch

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
            Lanczos steps from the first right-hand side (products that are counted once; the scale is kept in the
            state for every later one).

    Raises:
        ValueError: max_iterations < 1, rtol outside [0, 1), a scale that is neither positive nor "auto".
    """

    max_iterations: int = 10
    rtol: float | None = None
    scale: float | str = "auto"

    def __post_init__(self) -> None:
        check_iterations("Neumann", self.max_iterations, self.rtol)
        if self.scale != "auto" and (isinstance(self.scale, str) or not 0.0 < self.scale < math.inf):
            raise ValueError(f"Neumann: scale must be a positive number or 'auto', got {self.scale!r}")

    def prepare(self, operator: Any) -> _Scale:
        return _Scale(None if isinstance(self.scale, str) else self.scale)

    def _solve(self, operator: LinearOperator, b: Params, x0: Params | None, state: _Scale) -> Solution:
        products = 0
        if state.value is None:
            state.ritz_values = ritz_values(operator, b, _LANCZOS_STEPS)
            products = len(state.ritz_values)
            largest = max((abs(value) for value in state.ritz_values), default=math.nan)
            if operator.agree(not math.isfinite(largest)):
                return Solution(b, Status.NON_FINITE, (1.0, math.nan), 0, products)
            state.value = 1.0 / (_SAFETY * largest) if largest > 0.0 else 1.0
        return _Series(self, operator, b, state.value, products).sum(x0)


class _Series:
    """One solve: the partial sum x, its residual r, and what must be known to report on them."""

    def __init__(self, options: Neumann, operator: LinearOperator, b: Params, alpha: float, products: int) -> None:
        self.options, self.operator, self.b, self.alpha, self.products = options, operator, b, alpha, products
        self.norm_b = float(tree.norm(b))
        self.rounding, self.product_error = rounding_unit(b), product_error(operator, b)
        # Exact residuals have convex logarithms in k: one that grew once grows for ever.
        self.growth = 1.0 + (math.sqrt(self.rounding) if operator.exact else 0.1)
        self.norm_a = 0.0
        self.min_curvature: float | None = None

    def sum(self, x0: Params | None) -> Solution:
        x = tree.zeros_like(self.b) if x0 is None else x0
        r = self.b if x0 is None else self._residual(x)
        start = relative = self._relative(r)
        if self.operator.agree(not math.isfinite(start)):
            return Solution(self.b, Status.NON_FINITE, (start, math.nan), 0, self.products)
        iterations, breakdown = 0, None
        while iterations < self.options.max_iterations and not self._good_enough(relative):
            product, breakdown = self._product(r)
            new_x, new_r = tree.axpy(self.alpha, r, x), tree.axpy(-self.alpha, product, r)
            new_relative = self._relative(new_r)
            breakdown = breakdown or self._classify_step(relative, new_relative)
            if breakdown is not None:
                if iterations == 0 and x0 is None:
                    x, r = self.b, tree.sub(self.b, product)
                    relative = self._relative(r)
                break
            x, r, relative = new_x, new_r, new_relative
            iterations += 1
        level = attainable(self.norm_a, x, self.norm_b, self.rounding)
        if not self.operator.exact or max(iterations, 1) * level > 0.1 * relative:
            relative = self._relative(self._residual(x))
        settled = self.operator.exact and relative <= 10.0 * level
        if breakdown is None or (settled and breakdown is not Status.NON_FINITE):
            breakdown = self._verdict(relative, iterations, settled)
        return Solution(x, breakdown, (start, relative), iterations, self.products, self.min_curvature)

    def _product(self, r: Params) -> tuple[Params, Status | None]:
        """A r and what it says about A."""
        product = self.operator(r)
        self.products += 1
        rr = tree.dot(r, r)
        curvature, gain = torch.stack([tree.dot(r, product) / rr, tree.norm(product) / rr.sqrt()]).tolist()
        self.norm_a = max(self.norm_a, gain if math.isfinite(gain) else 0.0)
        if math.isfinite(curvature):
            self.min_curvature = curvature if self.min_curvature is None else min(self.min_curvature, curvature)
        verdict = classify_curvature(curvature, gain, self.norm_a, self.product_error)
        return product, (verdict or Status.NON_FINITE) if self.operator.agree(verdict is not None) else None

    def _classify_step(self, old: float, new: float) -> Status | None:
        if self.operator.agree(not math.isfinite(new)):
            return Status.NON_FINITE
        return Status.DIVERGED if new > old * self.growth else None

    def _residual(self, x: Params) -> Params:
        self.products += 1
        return residual(self.operator, self.b, x)

    def _relative(self, r: Params) -> float:
        return float(tree.norm(r)) / self.norm_b

    def _good_enough(self, relative: float) -> bool:
        return relative <= max(self.options.rtol or 0.0, self.rounding)

    def _verdict(self, relative: float, iterations: int, settled: bool) -> Status:
        if not math.isfinite(relative):
            return Status.NON_FINITE
        if self.options.rtol is None:
            early = iterations < self.options.max_iterations
            return Status.CONVERGED if early and (settled or self._good_enough(relative)) else Status.BUDGET
        return Status.CONVERGED if relative <= self.options.rtol else Status.NOT_CONVERGED


def ritz_values(operator: LinearOperator, b: Params, steps: int) -> tuple[float, ...]:
    """Eigenvalue estimates of A from `steps` Lanczos steps that start at b, ascending; one product a step.

    Fewer come back where the Krylov space is exhausted; a product that is not finite gives a NaN.
    """
    q = tree.scale(1.0 / float(tree.norm(b)), b)
    basis = [q]
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    for _ in range(steps):
        w = operator(q)
        diagonal.append(float(tree.dot(q, w)))
        for vector in basis:
            w = tree.axpy(-tree.dot(vector, w), vector, w)
        beta = float(tree.norm(w))
        if not (math.isfinite(beta) and math.isfinite(diagonal[-1])):
            return (math.nan,) * len(diagonal)
        if beta <= 10.0 * rounding_unit(b) * max(abs(a) for a in diagonal) or len(diagonal) == steps:
            break
        off_diagonal.append(beta)
        q = tree.scale(1.0 / beta, w)
        basis.append(q)
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if off_diagonal:
        band = torch.diag(torch.tensor(off_diagonal, dtype=torch.float64), 1)
        tridiagonal = tridiagonal + band + band.T
    return tuple(torch.linalg.eigvalsh(tridiagonal).tolist())
