"""F(x, y*(x)) in float64 with y* solved exactly, its gradient and its lowest value; outside every clock."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from benchmarks.race.problems import Batch, Loss

TOLERANCE = 1e-10
"""The norm of dG/dy at what counts as y*."""


class Reduced(ABC):
    """The upper objective at the exact lower solution, a function of x alone."""

    @abstractmethod
    def value(self, x: Tensor) -> float:
        """F(x, y*(x))."""

    @abstractmethod
    def lowest(self) -> float:
        """The lowest value, as an independent method finds it."""


class ReducedQuadratic(Reduced):
    """Of two quadratic sums: 1/2 x'Hx + c'x and a constant.

    Args:
        below, above: row numbers, A, B, C, a, b of the samples of G and of F.
    """

    def __init__(self, below: Batch, above: Batch) -> None:
        A, _, C, a, _ = (t.double().mean(0) for t in below[1:])
        D, E, K, d, e = (t.double().mean(0) for t in above[1:])
        # y*(x) = Jx + r
        J, r = -torch.linalg.solve(A, C.T), -torch.linalg.solve(A, a)
        self.hessian = J.T @ D @ J + E + K @ J + (K @ J).T
        self.linear = J.T @ (D @ r + d) + K @ r + e
        self.constant = float(0.5 * r @ D @ r + d @ r)

    def value(self, x: Tensor) -> float:
        x = x.detach().double()
        return float(0.5 * x @ self.hessian @ x + self.linear @ x) + self.constant

    def lowest(self) -> float:
        return self.value(-torch.linalg.solve(self.hessian, self.linear))


class ReSolved(Reduced):
    """Of a strongly convex G: y* by Newton's method with conjugate gradients, from the last one on.

    Args:
        upper, lower: where x and y start.
        below, above: all samples of G and of F.
    """

    def __init__(
        self, upper: Tensor, lower: Tensor, lower_loss: Loss, below: Batch, upper_loss: Loss, above: Batch
    ) -> None:
        self.lower_loss, self.below = lower_loss, _double(below)
        self.upper_loss, self.above = upper_loss, _double(above)
        self.start, self.last = upper.double(), lower.double()

    def value(self, x: Tensor) -> float:
        x = x.detach().double()
        return float(self.upper_loss(x, self.solution(x), self.above))

    def solution(self, x: Tensor) -> Tensor:
        """y*(x).

        Raises:
            RuntimeError: the norm of dG/dy is still above the tolerance after 50 steps.
        """
        x, y, norm = x.detach().double(), self.last, float("inf")
        for _ in range(50):
            y = y.detach().requires_grad_()
            value = self.lower_loss(x, y, self.below)
            (graph,) = torch.autograd.grad(value, y, create_graph=True)
            gradient, before = graph.detach(), float(value.detach())
            norm = float(gradient.norm())
            if norm < TOLERANCE:
                self.last = y.detach()
                return self.last
            step = conjugate_gradients(_product(graph, y), gradient, min(0.1, norm) * norm)
            length, slope, y = 1.0, float(gradient @ step), y.detach()
            while length > 1e-6 and float(self.lower_loss(x, y - length * step, self.below)) > (
                before - 1e-4 * length * slope + 1e-14
            ):
                length *= 0.5
            y = y - length * step
        raise RuntimeError(f"the exact lower solution was not found to {TOLERANCE}: dG/dy has norm {norm:g}")

    def gradient(self, x: Tensor) -> Tensor:
        """The hypergradient at the exact lower solution: dF/dx - d2G/dxdy [d2G/dydy]^-1 dF/dy."""
        x, y = x.detach().double().requires_grad_(), self.solution(x).requires_grad_()
        direct, right = torch.autograd.grad(
            self.upper_loss(x, y, self.above), (x, y), allow_unused=True, materialize_grads=True
        )
        (graph,) = torch.autograd.grad(self.lower_loss(x, y, self.below), y, create_graph=True)
        v = conjugate_gradients(_product(graph, y), right, 1e-12)
        return direct - torch.autograd.grad(graph, x, v)[0]

    def lowest(self) -> float:
        """By L-BFGS in x and in x / 100 from the start, the lower of the two, within |x_k| <= 20, where sigmoid and exp
        have long come to their limits."""
        return min(self._lowest(scale) for scale in (1.0, 100.0))

    def _lowest(self, scale: float) -> float:
        def objective(z: np.ndarray) -> tuple[float, np.ndarray]:
            x = scale * torch.from_numpy(z)
            return self.value(x), scale * self.gradient(x).numpy()

        options = {"maxiter": 1000, "maxcor": 30, "gtol": 1e-8, "ftol": 1e-12}
        start, bounds = self.start.numpy() / scale, [(-20.0 / scale, 20.0 / scale)] * len(self.start)
        return float(minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).fun)


def conjugate_gradients(product: Callable[[Tensor], Tensor], right: Tensor, tolerance: float) -> Tensor:
    """Solves ``product(z) = right`` for a positive definite product, to a residual of norm `tolerance`."""
    z, residual = torch.zeros_like(right), right
    direction, square = residual, float(residual @ residual)
    for _ in range(10 * len(right)):
        if square**0.5 <= tolerance:
            break
        image = product(direction)
        length = square / float(direction @ image)
        z, residual = z + length * direction, residual - length * image
        previous, square = square, float(residual @ residual)
        direction = residual + (square / previous) * direction
    return z


def _product(gradient: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda v: torch.autograd.grad(gradient, y, v, retain_graph=True)[0]


def _double(batch: Batch) -> Batch:
    return tuple(t.double() if t.is_floating_point() else t for t in batch)
