"""Products on fewer batches, as many as their noise asks for."""

import math
from dataclasses import dataclass
from typing import final

from bilevel import tree
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
        curvature: the largest :math:`d^\top A d / d^\top d` met, by which the length of a step is told before its
            product: :math:`\alpha = d^\top r / (\text{curvature} \cdot d^\top d)`, at most the right one where it is
            the largest eigenvalue.
        following: the number of the next batch.
    """

    deviation: float | None = None
    curvature: float | None = None
    following: int = 0

    def measured(self, error: float, operator: LinearOperator) -> None:
        """Take note of the standard error of a whole product, relative to its vector."""
        self.deviation = error * math.sqrt(operator.batches)

    def met(self, curvature: float) -> None:
        """Take note of a direction's."""
        self.curvature = curvature if self.curvature is None else max(self.curvature, curvature)

    def step(self, direction: Params, r: Params) -> tuple[float, float] | None:
        """The length alpha of a step along d where the residual is r, and that of alpha d; None before any was met."""
        if self.curvature is None:
            return None
        square, along = tree.read(tree.dot(direction, direction), tree.dot(direction, r))
        alpha = along / (self.curvature * square) if square > 0.0 else 0.0
        return alpha, abs(alpha) * math.sqrt(square)

    def product(self, operator: LinearOperator, direction: Params, r: Params, tolerance: float) -> Params:
        """A d, for a direction where the residual is r; the tolerance is in its units."""
        step = self.step(direction, r)
        chosen = None if step is None else self._chosen(operator.batches, step[1], tolerance)
        return operator(direction) if chosen is None else operator.on_batches(direction, chosen)

    def _chosen(self, batches: int, length: float, tolerance: float) -> list[int] | None:
        """Which batches for a step of this length; None for all of them."""
        if self.deviation is None:
            return None
        missed = self.deviation * length
        count = 1 if missed == 0.0 else math.ceil(1.0 / (1.0 / batches + (_SHARE * tolerance / missed) ** 2))
        if count >= batches:
            return None
        chosen = [(self.following + k) % batches for k in range(count)]
        self.following = (self.following + count) % batches
        return chosen
