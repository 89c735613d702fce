"""Quadratic problems with a known spectrum, whose solvers are compared."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel import Params, Problem, tree

ALL = 1e6
"""Seconds that are never over."""
FEW = (1, 2, 4, 8, 20)


class Quadratic(Problem):
    """G = 1/2 y'(A + D_batch) y - x'y + m'y with a diagonal D of each batch, F = 1/2 ||y - t||^2 + c'x."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        y = tree.flatten(lower)
        return 0.5 * y @ (self.matrix.to(y) @ y) + 0.5 * (batch.to(y) * y * y).sum() - (upper["x"] * y).sum()

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return 0.5 * (tree.flatten(lower) - batch).square().sum() + upper["x"].sum()


class Point:
    """The problem at random variables in three leaves, one of them 0-dimensional.

    Args:
        eigenvalues: of the matrix, in random directions.
        spread: of the lower batches' diagonals, whose mean is 0.
    """

    def __init__(
        self, eigenvalues: Sequence[float], *, dtype: torch.dtype = torch.float64, spread: float = 0.0, batches: int = 3
    ) -> None:
        generator, n = torch.Generator().manual_seed(0), len(eigenvalues)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        directions = torch.linalg.qr(drawn(n, n)).Q
        self.matrix = directions @ torch.diag(torch.tensor(list(eigenvalues), dtype=torch.float64)) @ directions.T
        self.y, self.x = drawn(n), drawn(n)
        diagonals = spread * drawn(batches, n)
        self.diagonals = diagonals - diagonals.mean(0)
        self.targets = [drawn(n) for _ in range(2)]
        self.problem = Quadratic(self.matrix.to(dtype))
        cut = self.y.to(dtype)
        self.lower = {"a": cut[: n - 3].clone(), "b": cut[n - 3].clone(), "c": cut[n - 2 :].reshape(1, 2).clone()}
        self.upper = {"x": self.x.to(dtype)}
        self.upper_batches = [target.to(dtype) for target in self.targets]
        self.lower_batches = [diagonal.to(dtype) for diagonal in self.diagonals]

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            **{"problem": self.problem, "upper": self.upper, "lower": self.lower},
            **{"upper_batches": self.upper_batches, "lower_batches": self.lower_batches},
        }

    def right(self, index: int) -> Tensor:
        return self.y - self.targets[index]

    def solution(self, index: int) -> Tensor:
        return torch.linalg.solve(self.matrix, self.right(index))
