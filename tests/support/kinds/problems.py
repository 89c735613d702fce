"""Small bilevel problems whose lower level is constrained, penalised, a fixed point or a root, in float64."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel import Params
from bilevel.linear import GMRES
from bilevel.lower import FixedPointProblem, ProximalMap, ProximalProblem, RootProblem

EXACT = GMRES(100, rtol=1e-13)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Penalised(ProximalProblem):
    """min_y 1/2 y'Hy - (c + B x)'y + h(x, y), times the batch; F = 1/2 |y - target|^2 + sum x^2 / 2 where x stands.

    `make_map` gives the map of h from the upper variables; `sees` says whether x stands in the smooth part too.
    """

    def __init__(
        self,
        hessian: Tensor,
        linear: Tensor,
        target: Tensor,
        make_map: Callable[[Params], ProximalMap],
        mixing: Tensor | None = None,
    ) -> None:
        self.hessian, self.linear, self.target, self.make_map, self.mixing = hessian, linear, target, make_map, mixing
        self.step_size = 1.0 / float(torch.linalg.matrix_norm(hessian, 2))

    def right(self, upper: Params) -> Tensor:
        return self.linear if self.mixing is None else self.linear + self.mixing @ upper["x"]

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        y = lower["y"]
        return 0.5 * y @ self.hessian @ y - (batch * self.right(upper)) @ y

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return 0.5 * (lower["y"] - self.target).square().sum()

    def proximal_map(self, upper: Params) -> ProximalMap:
        return self.make_map(upper)

    def solve(self, upper: Params, lower: Params, batches: Sequence[Any] = (1.0,), steps: int = 4000) -> Params:
        """y*, by as many proximal gradient steps on the mean objective."""
        return iterated(self, upper, lower, [sum(batches) / len(batches)], steps)


class Equilibrium(FixedPointProblem):
    """y = tanh(W y + batch U x + c), F = |y - 1|^2 + <x, x>/2."""

    def __init__(self, seed: int = 0, gain: float = 0.8) -> None:
        weight = draw(5, 5, seed=seed)
        self.weight = gain * weight / float(torch.linalg.matrix_norm(weight, 2))
        self.mixing, self.bias = draw(5, 3, seed=seed + 50), draw(5, seed=seed + 100)

    def fixed_point_map(self, upper: Params, lower: Params, batch: float) -> Params:
        return {"y": torch.tanh(self.weight @ lower["y"] + batch * (self.mixing @ upper["x"]) + self.bias)}

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return (lower["y"] - 1.0).square().sum() + 0.5 * upper["x"].square().sum()

    def by_dense_algebra(self, upper: Params, lower: Params, batches: Sequence[float] = (1.0,)) -> Tensor:
        """dF/dx by the matrices of the theorem, T being the mean over the batches."""
        x, y, eye = upper["x"], lower["y"], torch.eye(5, dtype=torch.float64)
        slopes = [
            1.0 - torch.tanh(self.weight @ y + batch * (self.mixing @ x) + self.bias).square() for batch in batches
        ]
        of_y = sum((s[:, None] * self.weight for s in slopes), torch.zeros(5, 5)) / len(batches)
        of_x = sum((b * s[:, None] * self.mixing for b, s in zip(batches, slopes, strict=True)), torch.zeros(5, 3))
        w = torch.linalg.solve((eye - of_y).T, 2.0 * (y - 1.0))
        return x + (of_x / len(batches)).T @ w


class Line(FixedPointProblem):
    """y = x + slope y, whose solution is x / (1 - slope), and F = y."""

    def __init__(self, slope: float) -> None:
        self.slope = slope

    def fixed_point_map(self, upper: Params, lower: Params, batch: Any) -> Params:
        return {"y": upper["x"] + self.slope * lower["y"]}

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return lower["y"].sum()


class Cubic(RootProblem):
    """y^3 + y = x for each entry, F = sum y^2; dy/dx = 1 / (3 y^2 + 1)."""

    def optimality(self, upper: Params, lower: Params, batch: Any) -> Params:
        y = lower["y"]
        return {"y": y**3 + y - upper["x"]}

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return lower["y"].square().sum()

    def solve(self, upper: Params) -> Params:
        y = torch.zeros_like(upper["x"])
        for _ in range(100):
            y = y - (y**3 + y - upper["x"]) / (3.0 * y**2 + 1.0)
        return {"y": y}


def iterated(
    problem: FixedPointProblem | ProximalProblem, upper: Params, lower: Params, batches: Sequence[Any], steps: int
) -> Params:
    """y after as many steps of the mean of T over the batches."""
    for _ in range(steps):
        images = [problem.fixed_point_map(upper, lower, batch) for batch in batches]
        lower = {name: torch.stack([image[name] for image in images]).mean(0).detach() for name in lower}
    return lower
