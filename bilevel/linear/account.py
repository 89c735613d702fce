"""The book-keeping that iterative solvers share: products, scales met, residuals, verdicts."""

import math
from collections.abc import Sequence
from typing import final

from torch import Tensor

from bilevel import tree
from bilevel.linear.operators import LinearOperator
from bilevel.linear.solution import Solution, Status
from bilevel.linear.solver import classify_curvature, product_error, residual, rounding_unit
from bilevel.tree import Params


@final
class CountedOperator(LinearOperator):
    """An operator that counts its products, one on m of K batches as m / K."""

    def __init__(self, operator: LinearOperator) -> None:
        self.operator, self.exact, self.symmetric = operator, operator.exact, operator.symmetric
        self.products: float = 0

    def __call__(self, vector: Params) -> Params:
        self.products += 1
        return self.operator(vector)

    def sampled(self, vector: Params) -> tuple[Params, Tensor | None]:
        self.products += 1
        return self.operator.sampled(vector)

    @property
    def batches(self) -> int:
        return self.operator.batches

    def on_batches(self, vector: Params, batches: Sequence[int]) -> Params:
        self.products += len(batches) / self.batches if len(batches) < self.batches else 1
        return self.operator.on_batches(vector, batches)

    def agree(self, flag: bool) -> bool:
        return self.operator.agree(flag)


@final
class Account:
    """What one iterative solve must know to stop in time and to report on itself.

    Attributes:
        operator: A, counting its products.
        norm_a: the largest ``||A d|| / ||d||`` met, an estimate of ``||A||`` from below.
        curve: relative residual of the recursion after each iteration.
        noise: relative standard error of a product from the choice of batches where that stands for rtol, once it is
            measured; None otherwise.
        passed_negative_curvature: whether iterations went through a direction with ``d'Ad <= 0``, as asked.
    """

    def __init__(
        self, operator: LinearOperator, b: Params, max_iterations: int, rtol: float | None, products: float = 0
    ) -> None:
        self.operator, self.b = CountedOperator(operator), b
        self.operator.products = products
        self.max_iterations, self.rtol = max_iterations, rtol
        self.norm_b = float(tree.norm(b))
        self.rounding, self.product_error = rounding_unit(b), product_error(operator, b)
        self.norm_a = 0.0
        self.min_curvature: float | None = None
        self.curve: list[float] = []
        self.noise: float | None = None
        self.passed_negative_curvature = False
        # The iterate that was asked about last, with its norm: several questions follow on each.
        self._sized: tuple[Params, float] | None = None

    @property
    def iterations(self) -> int:
        return len(self.curve)

    def residual(self, x: Params) -> Params:
        return residual(self.operator, self.b, x)

    def relative(self, r: Params) -> float:
        return (self.norm_b if r is self.b else float(tree.norm(r))) / self.norm_b

    def meet(self, curvature: float, gain: float) -> Status | None:
        """Take note of a direction; what it says about A, as `classify_curvature`."""
        self.norm_a = max(self.norm_a, gain if math.isfinite(gain) else 0.0)
        if math.isfinite(curvature):
            self.min_curvature = curvature if self.min_curvature is None else min(self.min_curvature, curvature)
        return classify_curvature(curvature, gain, self.norm_a, self.product_error)

    def sized(self, x: Params, norm: float) -> None:
        """Take note of ``||x||`` where it is known."""
        self._sized = x, norm

    def attainable(self, x: Params) -> float:
        """The relative residual to which x = A^-1 b can be computed: ``eps (1 + ||A|| ||x|| / ||b||)``."""
        if self._sized is None or self._sized[0] is not x:
            self.sized(x, float(tree.norm(x)))
        assert self._sized is not None
        return self.rounding * (1.0 + self.norm_a * self._sized[1] / self.norm_b)

    def drifted(self, x: Params, relative: float) -> bool:
        """Whether the recursion's residual may differ from the true one by more than a tenth."""
        return not self.operator.exact or max(self.iterations, 1) * self.attainable(x) > 0.1 * relative

    def at_rounding_level(self, x: Params, relative: float) -> bool:
        """Whether a measured residual has reached the rounding level, below which no iteration helps."""
        return self.operator.exact and relative <= 10.0 * self.attainable(x)

    def good_enough(self, relative: float) -> bool:
        return relative <= max(self.rtol or 0.0, self.rounding)

    def unfinished(self, relative: float) -> bool:
        """Whether another iteration is both needed and allowed."""
        return self.iterations < self.max_iterations and not self.good_enough(relative)

    def verdict(self, relative: float, at_rounding: bool) -> Status:
        """The status of a solve without breakdown, from its measured residual."""
        if not math.isfinite(relative):
            return Status.NON_FINITE
        if self.rtol is None:
            # A layer-wise recursion may run out of residual early, at a point that solves another system.
            early = self.iterations < self.max_iterations
            if early and (at_rounding or self.good_enough(relative)):
                return Status.CONVERGED
            return Status.NEGATIVE_CURVATURE_PASSED if self.passed_negative_curvature else Status.BUDGET
        if self.noise is None:
            return Status.CONVERGED if relative <= self.rtol else Status.NOT_CONVERGED
        # Batches that agree to rounding ask for no more than rounding lets be reached.
        if relative > self.rtol and not at_rounding:
            return Status.NOT_CONVERGED
        if self.noise >= 1.0:
            return Status.LOST_IN_THE_NOISE
        return Status.CONVERGED if at_rounding else Status.AT_THE_NOISE

    def close(
        self,
        status: Status,
        x: Params,
        residuals: tuple[float, float],
        ritz_range: tuple[float, float] | None = None,
        iterations: int | None = None,
    ) -> Solution:
        """What is told of the solve; `iterations` where not all of them are in the curve."""
        return Solution(
            x,
            status,
            residuals,
            self.iterations if iterations is None else iterations,
            self.operator.products,
            self.min_curvature,
            residual_curve=tuple(self.curve),
            ritz_range=ritz_range,
        )
