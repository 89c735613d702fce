"""Truncated Neumann series with an automatic scale."""

import math
from dataclasses import dataclass, field
from typing import Any, final

import torch

from bilevel import tree
from bilevel.operators import LinearOperator
from bilevel.solution import Solution, Status
from bilevel.solvers.base import Solver, check_iterations, classify_curvature, residual, rounding_unit
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
    :math:`\alpha = 1` on A = I + H/c it diverges as soon as ``||H|| > 2 c`` along a positive eigenvalue.

    Args:
        max_iterations: at most this many terms K, one product each (the last one gives the true residual).
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
                return Solution(b, Status.NON_FINITE, (1.0, math.nan), 0, max(products, 1))
            state.value = 1.0 / (_SAFETY * largest) if largest > 0.0 else 1.0
        return self._series(operator, b, x0, state.value, products)

    def _series(
        self, operator: LinearOperator, b: Params, x0: Params | None, alpha: float, products: int
    ) -> Solution:
        norm_b, rounding = float(tree.norm(b)), rounding_unit(b)
        x = tree.zeros_like(b) if x0 is None else x0
        r = b if x0 is None else residual(operator, b, x)
        products += x0 is not None
        start = relative = float(tree.norm(r)) / norm_b
        best, best_relative, gain_seen = (b if x0 is None else x), start, 0.0
        smallest: float | None = None
        iterations, breakdown = 0, None
        while iterations < self.max_iterations and relative > (rounding if self.rtol is None else self.rtol):
            product = operator(r)
            products += 1
            rr = tree.dot(r, r)
            curvature, gain = torch.stack([tree.dot(r, product) / rr, tree.norm(product) / rr.sqrt()]).tolist()
            gain_seen = max(gain_seen, gain if math.isfinite(gain) else 0.0)
            breakdown = classify_curvature(curvature, gain, gain_seen, rounding)
            if breakdown is not Status.NON_FINITE:
                smallest = curvature if smallest is None else min(smallest, curvature)
            if operator.agree(breakdown is not None):
                breakdown = breakdown or Status.NON_FINITE
                break
            x, r = tree.axpy(alpha, r, x), tree.axpy(-alpha, product, r)
            iterations += 1
            relative = float(tree.norm(r)) / norm_b
            if relative < best_relative or iterations == 1:
                best, best_relative = x, relative
            if operator.agree(not math.isfinite(relative) or relative > 1e3 * max(start, 1.0)):
                breakdown = Status.DIVERGED if math.isfinite(relative) else Status.NON_FINITE
                break
        if not operator.exact and math.isfinite(best_relative):
            best_relative = float(tree.norm(residual(operator, b, best))) / norm_b
            products += 1
        status = breakdown or self._verdict(best_relative, relative, start, iterations)
        return Solution(best, status, (start, best_relative), iterations, products, smallest)

    def _verdict(self, best: float, last: float, start: float, iterations: int) -> Status:
        if last > start:
            return Status.DIVERGED
        if self.rtol is None:
            return Status.BUDGET if iterations >= self.max_iterations else Status.CONVERGED
        return Status.CONVERGED if best <= self.rtol else Status.NOT_CONVERGED


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
