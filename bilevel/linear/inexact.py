"""Products on fewer batches, as many as their noise asks for."""

import math
from dataclasses import dataclass
from typing import final

from bilevel.linear.operators import LinearOperator
from bilevel.tree import Params

_SHARE = 0.5
"""Of the tolerance that one product's left-out batches may use up."""


@final
@dataclass
class InexactProducts:
    r"""Products with A, a mean over K batches, on m <= K of them.

    A product with a step :math:`\alpha d` that leaves batches out misses :math:`\sigma \|\alpha d\| (1/m - 1/K)^{1/2}`
    on average, with :math:`\sigma` the standard deviation of one batch's product over the length of its vector. It ends
    up in the residual as it is, so that the smaller the steps become, the fewer batches are needed (inexact Krylov
    methods: Bouras and Frayssé 2005; Simoncini and Szyld 2003; van den Eshof and Sleijpen 2004). m is the smallest for
    which that is at most half the tolerance. Batches take turns.

    Attributes:
        deviation: sigma, None before it was measured, or where A is no mean over batches: all products are then whole.
        step: the smallest step length alpha met, by which the next one's is told.
        following: the number of the next batch.
    """

    deviation: float | None = None
    step: float | None = None
    following: int = 0

    def measured(self, error: float, operator: LinearOperator) -> None:
        """Take note of the standard error of a whole product, relative to its vector."""
        self.deviation = error * math.sqrt(operator.batches)

    def met(self, step: float) -> None:
        """Take note of a step length."""
        self.step = step if self.step is None else min(self.step, step)

    def product(self, operator: LinearOperator, direction: Params, length: float, tolerance: float) -> Params:
        """A d for a direction of norm `length`, and a tolerance in the units of A d."""
        chosen = self._chosen(operator.batches, length, tolerance)
        return operator(direction) if chosen is None else operator.on_batches(direction, chosen)

    def _chosen(self, batches: int, length: float, tolerance: float) -> list[int] | None:
        """Which batches; None for all of them."""
        if self.deviation is None or self.step is None:
            return None
        missed = self.deviation * self.step * length
        count = 1 if missed == 0.0 else math.ceil(1.0 / (1.0 / batches + (_SHARE * tolerance / missed) ** 2))
        if count >= batches:
            return None
        chosen = [(self.following + k) % batches for k in range(count)]
        self.following = (self.following + count) % batches
        return chosen
