"""Eigenvalue estimates: Ritz values, from Lanczos steps of their own or from the coefficients of a solve."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from bilevel import tree
from bilevel.linear.operators import LinearOperator
from bilevel.linear.solver import reads_are_free, rounding_unit
from bilevel.tree import Params

Block = tuple[Sequence[float], Sequence[float]]
"""Diagonal and off-diagonal of a symmetric tridiagonal matrix; an off-diagonal too long is cut."""

# The leading part of a longer matrix has Ritz values too, and its eigenvalues cost next to nothing.
_LARGEST_BLOCK = 256


def ritz_values(operator: LinearOperator, b: Params, steps: int) -> tuple[float, ...]:
    """Eigenvalue estimates of A from `steps` Lanczos steps that start at b, ascending; one product a step.

    Fewer come back where the Krylov space is exhausted, for as many products on a CPU; elsewhere all are made, and read
    after the last. A product that is not finite gives a NaN.
    """
    diagonal, off_diagonal = _lanczos(operator, b, steps)
    if not all(map(math.isfinite, [*diagonal, *off_diagonal])):
        return (math.nan,) * len(diagonal)
    return tuple(_eigenvalues(diagonal, off_diagonal[: len(diagonal) - 1]).tolist())


def spectrum_bounds(operator: LinearOperator, b: Params, steps: int = 15) -> tuple[float, float] | None:
    """A smallest and a largest eigenvalue that A has hardly anything beyond: the extreme Ritz values of at most `steps`
    Lanczos steps, a product each, taken outwards by their residuals.

    The steps start from b and a random vector of its length. None where a product is not finite.
    """
    generator = torch.Generator().manual_seed(0)
    noise = {n: torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf) for n, leaf in b.items()}
    start = tree.axpy(tree.norm(b) / tree.norm(noise), noise, b)
    diagonal, off_diagonal = _lanczos(operator, start, steps)
    if not all(map(math.isfinite, [*diagonal, *off_diagonal])):
        return None
    values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, off_diagonal[: len(diagonal) - 1]))
    errors = off_diagonal[-1] * vectors[-1].abs()
    return float(values[0] - errors[0]), float(values[-1] + errors[-1])


def _lanczos(operator: LinearOperator, b: Params, steps: int) -> tuple[list[float], list[float]]:
    """Diagonal and off-diagonal of the Lanczos matrix from b, the norm of what follows being the last entry; cut where
    the Krylov space is exhausted or a number is not finite."""
    rounding, watched = 10.0 * rounding_unit(b), reads_are_free(b)
    length = tree.norm(b)
    q = tree.scale(1.0 / length, b)
    # Of b itself, whose product a caller may know.
    w = tree.scale(1.0 / length, operator(b))
    basis, rows = [q], []
    while True:
        curvature = tree.dot(q, w)
        # Twice is enough (Parlett 1998, section 6.9): once leaves of a nearly parallel w little but rounding along the
        # basis, and near a multiple of the identity every w is one.
        for vector in [*basis, *basis]:
            w = tree.axpy(-tree.dot(vector, w), vector, w)
        rest = tree.norm(w)
        rows.append(torch.stack([curvature, rest]))
        if len(rows) == steps or (watched and _end(torch.stack(rows).tolist(), rounding)):
            break
        q = tree.scale(1.0 / rest, w)
        basis.append(q)
        w = operator(q)
    numbers = torch.stack(rows).tolist()
    end = _end(numbers, rounding) or len(numbers)
    return [row[0] for row in numbers[:end]], [row[1] for row in numbers[:end]]


def _end(numbers: Sequence[Sequence[float]], rounding: float) -> int | None:
    """After how many Lanczos steps there is no other, None where there is one: curvature and rest of those made."""
    largest = 0.0
    for count, (curvature, rest) in enumerate(numbers, 1):
        largest = max(largest, abs(curvature))
        if rest <= rounding * largest or not (math.isfinite(rest) and math.isfinite(curvature)):
            return count
    return None


def ritz_range(blocks: Iterable[Block]) -> tuple[float, float] | None:
    """Smallest and largest eigenvalue over the blocks that Lanczos runs left; None if nothing finite was met."""
    lows, highs = [], []
    for diagonal, off_diagonal in blocks:
        length = _finite_length(diagonal, off_diagonal)
        if length:
            values = _eigenvalues(diagonal[:length], off_diagonal[: length - 1])
            lows.append(float(values[0]))
            highs.append(float(values[-1]))
    return (min(lows), max(highs)) if lows else None


def union_of_ranges(ranges: Sequence[tuple[float, float] | None]) -> tuple[float, float] | None:
    """The smallest interval that holds all of those known; None if there is none."""
    known = [found for found in ranges if found is not None]
    return (min(low for low, _ in known), max(high for _, high in known)) if known else None


def conjugate_block(pivots: Sequence[Tensor], conjugations: Sequence[Tensor]) -> Block:
    """The Lanczos matrix of a CG run: ``T = L D L'`` with pivots D = d'Ad / r'r (inverse step lengths).

    Args:
        pivots: ``d_k'A d_k / r_k'r_k``, one a product.
        conjugations: ``beta_k = r_{k+1}'r_{k+1} / r_k'r_k``.
    """
    if not pivots:
        return [], []
    count = len(pivots)
    readings = torch.stack([*pivots, *conjugations[: count - 1]]).tolist()
    steps, betas = readings[:count], readings[count:]
    diagonal = [step + (betas[k - 1] * steps[k - 1] if k else 0.0) for k, step in enumerate(steps)]
    return diagonal, [math.sqrt(beta) * step for beta, step in zip(betas, steps, strict=False)]


def _finite_length(diagonal: Sequence[float], off_diagonal: Sequence[float]) -> int:
    for k, value in enumerate(diagonal[:_LARGEST_BLOCK]):
        if not math.isfinite(value) or (k and not math.isfinite(off_diagonal[k - 1])):
            return k
    return min(len(diagonal), _LARGEST_BLOCK)


def _eigenvalues(diagonal: Sequence[float], off_diagonal: Sequence[float]) -> Tensor:
    return torch.linalg.eigvalsh(_tridiagonal(diagonal, off_diagonal))


def _tridiagonal(diagonal: Sequence[float], off_diagonal: Sequence[float]) -> Tensor:
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if not off_diagonal:
        return matrix
    band = torch.diag(torch.tensor(off_diagonal, dtype=torch.float64), 1)
    return matrix + band + band.T
