"""Direct solve: the oracle for small problems."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from bilevel import tree
from bilevel.linear.operators import LinearOperator
from bilevel.linear.solution import Solution, Status
from bilevel.linear.solver import Solver, product_error, residual
from bilevel.tree import Params


@dataclass
class _Spectrum:
    """A = U diag(values) V', found at the first right-hand side, which gives the names and their order: eigenvalues and
    U = V of a symmetric A, singular values of another one."""

    names: tuple[str, ...] = ()
    parts: tuple[Tensor, Tensor, Tensor] | None = None


@final
@dataclass(frozen=True)
class Dense(Solver):
    """Forms A column by column, n products, and solves by its eigendecomposition in float64; by its singular values
    where A is not symmetric (`Solution.min_curvature` and `ritz_range` are then None).

    Indefinite systems are solved like any other. In a singular one the solution of least norm is returned; if b is not
    in the range of A the status is INCONSISTENT, and where b is orthogonal to the range b itself comes back. The
    decomposition is made once for a state and serves every b.

    Args:
        max_size: refuse systems with more variables than this (memory is ``8 n^2`` bytes, time ``n^3``).

    Raises:
        ValueError: at solve, a system larger than max_size.
    """

    max_size: int = 5000
    needs_symmetric: ClassVar[bool] = False

    def prepare(self, operator: Any) -> _Spectrum:
        return _Spectrum()

    @property
    def tolerance(self) -> float:
        return 0.0

    @property
    def uses_start(self) -> bool:
        return False

    def _solve(self, operator: LinearOperator, b: Params, x0: Params | None, state: _Spectrum) -> Solution:
        n = tree.size(b)
        if n > self.max_size:
            raise ValueError(
                f"Dense: the system has {n} variables, more than max_size={self.max_size}; use an iterative solver"
            )
        products = 0
        parts = state.parts
        if parts is None:
            matrix = self._matrix(operator, b)
            products = n
            if operator.agree(not bool(torch.isfinite(matrix).all())):
                return Solution(b, Status.NON_FINITE, (1.0, math.nan), 0, products)
            parts = state.parts = _decomposed(matrix, symmetric=operator.symmetric)
            state.names = tuple(b)
        left, values, right = parts
        error = product_error(operator, b)
        live = values.abs() > n * error * values.abs().max()
        inverse = torch.where(live, 1.0 / torch.where(live, values, 1.0), 0.0)
        ordered = {name: b[name] for name in state.names}
        x = tree.unflatten(right @ (inverse * (left.T @ tree.flatten(ordered).to(left.dtype))), ordered)
        value = {name: x[name] for name in b}
        relative = float(tree.norm(residual(operator, b, value)) / tree.norm(b))
        status = Status.CONVERGED
        if not relative <= error**0.5:
            status = Status.NOT_CONVERGED if bool(live.all()) else Status.INCONSISTENT
        if operator.agree(not math.isfinite(relative)):
            status = Status.NON_FINITE
        if relative > 1.0 - error**0.5:
            # b is orthogonal to the range, and the least-squares solution 0 would silence the term.
            value, products = b, products + 1
            relative = float(tree.norm(residual(operator, b, b)) / tree.norm(b))
        seen = (float(values.min()), float(values.max())) if operator.symmetric else None
        return Solution(value, status, (1.0, relative), 1, products + 1, seen and seen[0], ritz_range=seen)

    def _matrix(self, operator: LinearOperator, b: Params) -> Tensor:
        flat = tree.flatten(b)
        columns = []
        for index in range(flat.numel()):
            basis = torch.zeros_like(flat)
            basis[index] = 1.0
            columns.append(tree.flatten(operator(tree.unflatten(basis, b))))
        return tree.wide(torch.stack(columns, dim=1))


def _decomposed(matrix: Tensor, *, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """U, values and V with A = U diag(values) V'."""
    if symmetric:
        values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.T))
        return vectors, values, vectors
    left, values, right = torch.linalg.svd(matrix)
    return left, values, right.mH
