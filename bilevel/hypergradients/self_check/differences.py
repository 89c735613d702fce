"""Derivatives of a function of one number that is known to unknown accuracy, by extrapolated central differences."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from bilevel import tree
from bilevel.tree import Params

_SHRINK = math.e
"""Ratio of steps. No root of a fraction, so that no period of the function is a multiple of all steps."""


def step_ranges(point: Params) -> list[tuple[float, float]]:
    """Largest and smallest steps to try: on the scale of x first, then between that and 1.

    Rounding can hide a derivative on the scale of a small x; below the last step the dtype resolves no point beside x.
    """
    size = float(tree.norm(point)) / math.sqrt(tree.size(point))
    resolved = max(torch.finfo(leaf.dtype).eps for leaf in point.values()) ** 0.5
    own = 0.1 * (size if size > 0.0 else 1.0)
    return [(own, own * resolved), *([(0.1, own)] if own < 0.05 else [])]


@dataclass(frozen=True)
class Estimate:
    """A derivative, how far its neighbours in the table are from it, and the largest and smallest step taken."""

    value: float
    doubt: float
    steps: tuple[float, float]

    def relative(self, scale: float) -> float:
        """The doubt relative to the value, or to `scale` where that is larger."""
        return self.doubt / size if (size := max(abs(self.value), scale)) > 0.0 else self.doubt


def derivative(
    function: Callable[[float], float], ranges: Sequence[tuple[float, float]], tolerance: float, *, scale: float
) -> Estimate:
    """Derivative at 0 from the first range of steps that makes it certain to `tolerance`, else the least uncertain.

    `scale` is the size of the derivatives along all directions, beside which this one may be small.
    """
    found: list[Estimate] = []
    for largest, smallest in ranges:
        found.append(_extrapolated(function, largest, smallest, tolerance, scale))
        if found[-1].relative(scale) <= tolerance:
            break
    return min(found, key=lambda e: e.relative(scale))


def _extrapolated(
    function: Callable[[float], float], step: float, smallest: float, tolerance: float, scale: float
) -> Estimate:
    """Central differences, extrapolated to step 0, until certain to `tolerance` or no step is left.

    Row k of the table holds the difference with step ``h / e^k`` and its extrapolations.
    """
    first, best, rows = step, Estimate(math.nan, math.inf, (step, step)), list[list[float]]()
    while True:
        row = [(function(step) - function(-step)) / (2.0 * step)]
        power = 1.0
        for order, older in enumerate(rows[-1] if rows else ()):
            power *= _SHRINK**2
            row.append((power * row[order] - older) / (power - 1.0))
        rows.append(row)
        # The doubt counts relative to the value: far too large a step gives small values, and small changes of them.
        for entry in (Estimate(*pair, (first, step)) for pair in _confirmed(rows)):
            best = entry if entry.relative(scale) < best.relative(scale) else best
        doubt = best.relative(scale)
        worsening = len(rows) > 1 and abs(row[-1] - rows[-2][-1]) > 4.0 * best.doubt
        if doubt <= 0.01 * tolerance or (doubt <= tolerance and worsening) or step / _SHRINK < smallest:
            return replace(best, steps=(first, step))
        step /= _SHRINK


def _confirmed(rows: list[list[float]]) -> list[tuple[float, float]]:
    """Extrapolations of the last row but one, and their distance from what they come from and the next smaller step."""
    if len(rows) < 3:
        return []
    older, row, newer = rows[-3:]
    orders = range(1, len(row))
    return [(row[i], math.hypot(*(row[i] - other for other in (row[i - 1], older[i - 1], newer[i])))) for i in orders]
