"""Generalised minimal residuals for systems that are not symmetric."""

import math
from dataclasses import dataclass
from types import NoneType
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import pad

from bilevel import tree
from bilevel.checks import check_count, check_kind
from bilevel.linear.account import Account
from bilevel.linear.operators import LinearOperator
from bilevel.linear.solution import Solution, Status
from bilevel.linear.solver import Solver, check_iterations, reads_are_free
from bilevel.tree import Params


@final
@dataclass(frozen=True)
class GMRES(Solver):
    """Generalised minimal residuals, restarted (Saad and Schultz 1986, algorithm 4), for any A.

    Within a cycle the iterate x_k minimizes ``||b - A x||`` over ``x0 + span{r, A r, ..., A^(k-1) r}``, so that the
    residual never grows; A need be neither symmetric nor positive. The basis is orthogonalised twice. At the end of a
    cycle the residual is measured by one more product, and it decides the status. In a singular system whose right-hand
    side is not in the range of A the status is INCONSISTENT.

    Args:
        max_iterations: at most this many iterations, one product each.
        restart: iterations of a cycle, which keeps as many vectors and one more; a shorter one takes less memory and
            may converge more slowly, or not at all. None: one cycle.
        rtol: stop once ``||b - A x|| <= rtol ||b||``; None makes exactly max_iterations (status BUDGET). Either way the
            solve ends early where the residual has reached the rounding level.

    On a GPU the products of a cycle with a fixed budget (rtol=None) are made without a synchronisation between them;
    what came after a breakdown is cut off.

    Raises:
        ValueError: max_iterations < 1, restart < 1, rtol outside [0, 1).
    """

    max_iterations: int = 30
    restart: int | None = None
    rtol: float | None = 1e-3
    needs_symmetric: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_iterations("GMRES", self.max_iterations, self.rtol)
        check_kind("GMRES: restart", self.restart, (int, NoneType), "a whole number, or None for a single cycle")
        if self.restart is not None:
            check_count("GMRES: restart", self.restart, least=1, otherwise="None for a single cycle")

    @property
    def tolerance(self) -> float | None:
        return self.rtol

    def _solve(self, operator: LinearOperator, b: Params, x0: Params | None, state: Any) -> Solution:
        account = Account(operator, b, self.max_iterations, self.rtol)
        x = tree.zeros_like(b) if x0 is None else x0
        r = b if x0 is None else account.residual(x)
        start = relative = account.relative(r)
        if operator.agree(not math.isfinite(start)):
            return account.close(Status.NON_FINITE, b, (start, math.nan))
        status = None
        while account.unfinished(relative) and not account.at_rounding_level(x, relative):
            cycle = _Cycle(account, r, self.restart or self.max_iterations)
            ahead = tree.add(x, cycle.correction())
            measured = account.residual(ahead)
            following = account.relative(measured)
            if operator.agree(cycle.broken or not math.isfinite(following)):
                status = Status.NON_FINITE
                break
            if following > relative:
                # Rounding alone lets it grow; another cycle would start from a worse point.
                break
            stalled = following > (1.0 - math.sqrt(account.product_error)) * relative
            x, r, relative = ahead, measured, following
            if cycle.closed and not account.good_enough(relative) and (stalled or cycle.singular):
                status = None if account.at_rounding_level(x, relative) else Status.INCONSISTENT
                break
        if status is None:
            status = account.verdict(relative, account.at_rounding_level(x, relative))
        if x0 is None and not relative < 1.0 - math.sqrt(account.product_error):
            # Nothing was gained over 0, which would silence the term.
            x = b
            relative = account.relative(account.residual(b)) if status is not Status.NON_FINITE else math.nan
        return account.close(status, x, (start, relative))


class _Cycle:
    """One Arnoldi run from a residual.

    Attributes:
        broken: a number was not finite.
        closed: the Krylov space is exhausted: no further iteration can help.
        singular: A is singular, to rounding, on the space.
    """

    def __init__(self, account: Account, r: Params, length: int) -> None:
        self.account, self.beta = account, float(tree.norm(r))
        self.basis = [tree.scale(1.0 / self.beta, r)]
        self.columns: list[list[float]] = []
        self.broken = self.closed = self.singular = False
        self._rotations: list[tuple[float, float]] = []
        self._right = [self.beta]
        self._triangle: list[list[float]] = []
        if account.rtol is not None or reads_are_free(r):
            while self._goes_on(length):
                self._take(self._product().tolist())
            return
        # All of a fixed budget is made without a read; what came after the last sound product is cut off.
        rows = [self._product() for _ in range(min(length, account.max_iterations - account.iterations))]
        for row in torch.stack([pad(row, (0, len(rows[-1]) - len(row))) for row in rows]).tolist():
            if self._goes_on(length):
                self._take(row)

    def correction(self) -> Params:
        """What the cycle adds to x: the combination of the basis of least residual."""
        count = len(self._triangle)
        if not count:
            return tree.zeros_like(self.account.b)
        matrix = torch.zeros(count, count, dtype=torch.float64)
        for j, column in enumerate(self._triangle):
            matrix[: j + 1, j] = torch.tensor(column, dtype=torch.float64)
        right = torch.tensor(self._right[:count], dtype=torch.float64)
        shares = _least_squares(matrix, right, self.account.product_error)
        total = tree.zeros_like(self.account.b)
        for share, vector in zip(shares.tolist(), self.basis, strict=False):
            total = tree.axpy(share, vector, total)
        return total

    def _goes_on(self, length: int) -> bool:
        """Whether another iteration is needed and possible."""
        account, ended = self.account, self.broken or self.closed or len(self.columns) == length
        return not ended and account.unfinished(abs(self._right[-1]) / account.norm_b)

    def _product(self) -> Tensor:
        """One more product, orthogonalised against the basis, which grows by it: the norm of the product, that of what
        is left of it, and its inner products with the basis."""
        w = self.account.operator(self.basis[-1])
        gain, passes = tree.norm(w), []
        for _ in range(2):
            shares = torch.stack([tree.dot(vector, w) for vector in self.basis])
            for share, vector in zip(shares, self.basis, strict=True):
                w = tree.axpy(-share, vector, w)
            passes.append(tree.wide(shares))
        rest = tree.norm(w)
        self.basis.append(tree.scale(1.0 / rest, w))
        return torch.cat([tree.wide(torch.stack([gain, rest])), passes[0] + passes[1]])

    def _take(self, row: list[float]) -> None:
        """Take note of a product's numbers, and turn the rotations that keep the matrix triangular."""
        account, count = self.account, len(self.columns) + 1
        size, rest, *column = row[: 2 + count]
        entries = [*column, rest]
        self.broken = account.operator.agree(not all(map(math.isfinite, entries)))
        if self.broken:
            return
        account.norm_a = max(account.norm_a, size)
        self.closed = rest <= 10.0 * account.product_error * account.norm_a
        self.columns.append(entries)
        self._rotate(list(entries))
        account.curve.append(abs(self._right[-1]) / account.norm_b)

    def _rotate(self, entries: list[float]) -> None:
        """A column of the Hessenberg matrix turned by the earlier rotations and by one of its own."""
        for j, (cosine, sine) in enumerate(self._rotations):
            upper, lower = entries[j], entries[j + 1]
            entries[j], entries[j + 1] = cosine * upper + sine * lower, cosine * lower - sine * upper
        length = math.hypot(entries[-2], entries[-1])
        self.singular = self.closed and length <= 10.0 * math.sqrt(self.account.product_error) * self.account.norm_a
        cosine, sine = (entries[-2] / length, entries[-1] / length) if length > 0.0 else (0.0, 1.0)
        self._rotations.append((cosine, sine))
        entries[-2] = length
        self._triangle.append(entries[:-1])
        last = self._right.pop()
        self._right += [cosine * last, -sine * last]


def _least_squares(matrix: Tensor, right: Tensor, error: float) -> Tensor:
    """The solution of least norm; singular values of rounding size count as 0."""
    u, values, v = torch.linalg.svd(matrix)
    live = values > len(values) * error * values.max()
    inverse = torch.where(live, 1.0 / torch.where(live, values, 1.0), 0.0)
    return v.mH @ (inverse * (u.mH @ right))
