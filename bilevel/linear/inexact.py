"""Products on fewer batches, as many as their noise asks for."""

import math
from dataclasses import dataclass
from typing import final

from bilevel import tree
from bilevel.linear.operators import LinearOperator
from bilevel.tree import Params

_SHARE = 0.7
"""Of the tolerance that the batches left out in one solve may use up together."""


@final
@dataclass
class InexactProducts:
    r"""Products with A, a mean over K batches, on m <= K of them.

    A product with a step :math:`\alpha d` that leaves batches out misses :math:`\sigma \|\alpha d\| (1/m - 1/K)^{1/2}`
    on average, with :math:`\sigma` the standard deviation of one batch's product over the length of its vector. It ends
    up in the residual as it is, so that the smaller the steps become, the fewer batches are needed (inexact Krylov
    methods: Bouras and Frayssé 2005; Simoncini and Szyld 2003; van den Eshof and Sleijpen 2004). m is the smallest for
    which that takes at most half of what is left of the square of 0.7 times the tolerance. Batches take turns.

    Attributes:
        deviation: sigma, None before it was measured, or where A is no mean over batches: all products are then whole.
        curvature: the largest :math:`d^\top A d / d^\top d` met, by which the length of a step is told before its
            product: :math:`\alpha = d^\top r / (\text{curvature} \cdot d^\top d)`, at most the right one where it is
            the largest eigenvalue.
        following: the number of the next batch.
        missed: the square of what this solve's products are expected to have missed together.
        partial: whether the last product left batches out.
    """

    deviation: float | None = None
    curvature: float | None = None
    following: int = 0
    missed: float = 0.0
    partial: bool = False

    def begin(self) -> None:
        """For another right-hand side."""
        self.missed, self.partial = 0.0, False

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
        self.partial = chosen is not None
        return operator(direction) if chosen is None else operator.on_batches(direction, chosen)

    def whole(self, operator: LinearOperator, direction: Params) -> Params:
        """The last product made again, over all batches."""
        self.partial = False
        return operator(direction)

    def _chosen(self, batches: int, length: float, tolerance: float) -> list[int] | None:
        """Which batches for a step of this length; None for all of them."""
        if self.deviation is None:
            return None
        one = (self.deviation * length) ** 2
        allowed = max(0.0, ((_SHARE * tolerance) ** 2 - self.missed) / 2.0)
        count = 1 if one == 0.0 else math.ceil(1.0 / (1.0 / batches + allowed / one))
        if count >= batches:
            return None
        self.missed += one * (1.0 / count - 1.0 / batches)
        chosen = [(self.following + k) % batches for k in range(count)]
        self.following = (self.following + count) % batches
        return chosen
