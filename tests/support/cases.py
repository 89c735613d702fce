"""Linear systems that every solver and every HVP provider must meet, with what is known about them."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bilevel import Params, Problem
from bilevel.linear import LinearOperator

DEFINITE, INDEFINITE, CONSISTENT, INCONSISTENT, NON_FINITE = (
    *("definite", "indefinite", "singular, consistent", "singular, inconsistent"),
    "non-finite",
)


@dataclass(frozen=True)
class Case:
    """A symmetric system A x = b in float64.

    Attributes:
        shapes: of the leaves that A's variables are split into, in order.
        unused: how many of the last leaves the objective does not touch at all (A has zeros there).
        kind: one of the constants of this file.
    """

    name: str
    matrix: Tensor
    right: Tensor
    shapes: tuple[tuple[int, ...], ...]
    kind: str
    unused: int = field(default=0)

    def __str__(self) -> str:
        return self.name

    def split(self, vector: Tensor) -> Params:
        leaves = vector.split([torch.Size(shape).numel() for shape in self.shapes])
        return {
            f"leaf{k}": leaf.reshape(shape) for k, (leaf, shape) in enumerate(zip(leaves, self.shapes, strict=True))
        }

    @property
    def b(self) -> Params:
        return self.split(self.right)

    def solution(self) -> Tensor:
        """The solution of least norm, or the least-squares one."""
        return torch.linalg.pinv(self.matrix, hermitian=True, rtol=1e-12) @ self.right

    @property
    def length(self) -> float:
        """||b||, without overflow."""
        largest = float(self.right.abs().max())
        return largest * float((self.right / largest).norm())

    def relative_residual(self, x: Params) -> float:
        return float((self.right / self.length - self.matrix @ (joined(x) / self.length)).norm())


def joined(x: Params) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in x.values()])


class Counting(LinearOperator):
    """An operator that remembers what it was asked for."""

    def __init__(self, function: Callable[[Params], Params], *, exact: bool = True) -> None:
        self.function, self.exact = function, exact
        self.asked: list[Tensor] = []

    def __call__(self, vector: Params) -> Params:
        self.asked.append(joined(vector).clone())
        return self.function(vector)


def dense(matrix: Tensor, split: Callable[[Tensor], Params]) -> Counting:
    """A matrix as a counting operator on the leaves that `split` makes."""
    return Counting(lambda vector: split(matrix @ joined(vector)))


class Quadratic(Problem):
    """L = 1/2 y'Ay, over the leaves that are used; F = b'y, so that dF/dy = b."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def _variables(self, lower: Params) -> Tensor:
        names = list(lower)
        return joined({name: lower[name] for name in names[: len(names) - self.case.unused]})

    def lower_objective(self, upper: Params, lower: Params, batch: float) -> Tensor:
        y = self._variables(lower)
        return batch * 0.5 * y @ self.case.matrix[: y.numel(), : y.numel()] @ y

    def upper_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
        return self.case.right @ joined(lower)


def with_spectrum(values: list[float], seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues in random directions."""
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    directions = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    return directions @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ directions.T


def vector(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _cases() -> list[Case]:
    split = ((2, 2), (), (3,))
    well = with_spectrum([0.8, 0.9, 1.0, 1.3, 2.0, 2.5, 3.0, 4.0])
    ill = with_spectrum([1e-6, 1e-3, 1e-2, 0.1, 0.3, 0.5, 0.8, 1.0])
    indefinite = with_spectrum([-1.0, -0.2, 0.5, 0.7, 1.0, 2.0, 3.0, 4.0])
    singular = with_spectrum([0.0, 0.0, 0.8, 0.9, 1.0, 2.0, 3.0, 4.0])
    unused = torch.zeros(8, 8, dtype=torch.float64)
    unused[:5, :5] = with_spectrum([0.6, 1.0, 1.5, 2.0, 3.0])
    untouched = torch.cat([vector(5), torch.zeros(3, dtype=torch.float64)])
    broken = well.clone()
    broken[2, 2] = torch.nan
    nan_right = vector(8)
    nan_right[3] = torch.nan
    one = torch.tensor([[2.5]], dtype=torch.float64)
    return [
        Case("identity", torch.eye(8, dtype=torch.float64), vector(8), split, DEFINITE),
        Case("well-conditioned", well, vector(8), split, DEFINITE),
        Case("ill-conditioned", ill, vector(8), split, DEFINITE),
        Case("one scalar", one, vector(1), ((),), DEFINITE),
        Case("an empty leaf", well, vector(8), ((2, 2), (0, 3), (4,)), DEFINITE),
        Case("tiny right-hand side", well, 1e-200 * vector(8), split, DEFINITE),
        Case("huge right-hand side", well, 1e200 * vector(8), split, DEFINITE),
        Case("tiny operator", 1e-12 * well, vector(8), split, DEFINITE),
        Case("indefinite", indefinite, vector(8), split, INDEFINITE),
        Case("negative definite", -well, vector(8), split, INDEFINITE),
        Case("singular, consistent", singular, singular @ vector(8), split, CONSISTENT),
        Case("unused variables, no demand on them", unused, untouched, ((5,), (), (2,)), CONSISTENT, 2),
        Case("singular, inconsistent", singular, vector(8), split, INCONSISTENT),
        Case("unused variables, in demand", unused, vector(8), ((5,), (), (2,)), INCONSISTENT, 2),
        Case("zero operator", torch.zeros(8, 8, dtype=torch.float64), vector(8), split, INCONSISTENT),
        Case("NaN in the operator", broken, vector(8), split, NON_FINITE),
        Case("NaN in the right-hand side", well, nan_right, split, NON_FINITE),
    ]


CASES = _cases()
BY_NAME = {case.name: case for case in CASES}
