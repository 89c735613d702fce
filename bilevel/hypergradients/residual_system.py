"""Systems of lower levels that are no smooth minimum: (dS/dy)' w = dF/dy for fixed points, roots, proximal problems."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.hypergradients.system import System
from bilevel.linear import FunctionOperator, LinearOperator, MeanOperator
from bilevel.lower import (
    Examination,
    FixedPointProblem,
    ProximalPoint,
    ProximalProblem,
    ResidualProblem,
    check_step_size,
    differentiates,
    largest_entry,
    map_of,
    residual_field,
)
from bilevel.problem import Problem
from bilevel.products import HVPProvider, Linearization, ReverseOverReverse, linearize_fields
from bilevel.tree import Params

_NO_SOLUTION = 1e-2
"""Of the size of y: the norm of the residual above which y is no solution."""
_DEGENERATE = 10.0
"""Multiples of the largest entry of the residual within which a kink of the proximal map is not told from the point."""


class ResidualSystem(System):
    r"""The system of a fixed point or a root: the operator is :math:`(\partial S/\partial y)^\top`, `cross` gives
    :math:`(\partial S/\partial x)^\top w` and `gradient` S, each the mean over batches and ranks."""

    problem: ResidualProblem

    def __init__(self, problem: ResidualProblem, *args: Any, hvp: HVPProvider, damping: float, **options: Any) -> None:
        name = type(problem).__name__
        if not isinstance(hvp, ReverseOverReverse):
            raise ValueError(
                f"hvp={type(hvp).__name__}: the lower level of {name} is a residual, of which there are "
                "vector-Jacobian products alone; leave hvp out, or pass ReverseOverReverse(keep_graph=True) to keep "
                "the graph of a pass between products"
            )
        if type(problem).regularizer is not Problem.regularizer:
            raise ValueError(
                f"{name} defines a regularizer, which is no part of a residual; add its gradient to the residual, or "
                "derive from ProximalProblem, whose smooth part has one"
            )
        super().__init__(problem, *args, hvp=hvp, damping=damping, **options)

    def flaw(self) -> str | None:
        gradient, noise = self.gradient_and_noise()
        return _not_solved(self, gradient, noise, self._size_of_solution)

    @cached_property
    def _size_of_solution(self) -> float:
        """In the units of S: ||y|| for a map, ||(dS/dy)' y|| where S has units of its own."""
        y = self.variables(self.lower)
        return float(tree.norm(y if isinstance(self.problem, FixedPointProblem) else self.operator(y)))

    def _examined(self) -> Examination:
        return Examination()

    def _linearizations(self, batches: Sequence[Any], resident: Iterable[Tensor] = ()) -> list[Linearization]:
        assert isinstance(self.hvp, ReverseOverReverse)
        fields = [
            residual_field(self.problem, self._objectives, batch, self._objectives.seed + k)
            for k, batch in enumerate(batches)
        ]
        return linearize_fields(fields, self.upper, self.variables(self.lower), self.hvp, resident=resident)

    def _without_tikhonov(self, point: Params) -> LinearOperator:
        symmetric = self.problem.symmetric
        return MeanOperator([FunctionOperator(loss.hessian, symmetric=symmetric) for loss in self._losses])


class ProximalSystem(System):
    r"""The system of T = prox(y - eta dG/dy): with J the derivative of the map at y - eta dG/dy and u = J' w,

    .. math:: A w = w - u + \eta \frac{\partial^2 G}{\partial y^2} u + \text{tikhonov}\, w, \qquad
       \text{cross}\, w = \eta \frac{\partial^2 G}{\partial x \partial y} u
       - \Big(\frac{\partial \operatorname{prox}}{\partial x}\Big)^{\!\top} w.

    The gradient is averaged over batches and ranks before the map; `gradient` is S = y - T.
    """

    problem: ProximalProblem

    def __init__(
        self, problem: ProximalProblem, upper: Params, lower: Params, *args: Any, damping: float, **options: Any
    ) -> None:
        name = type(problem).__name__
        check_step_size(problem)
        if damping != 0.0:
            raise ValueError(
                f"damping={damping}: damping adds to a regularizer's weight in the system of a smooth minimum, and "
                f"{name} is a proximal problem; raise regularization_weight, or use tikhonov for the system alone"
            )
        if not problem.curvature_depends_on_upper:
            raise ValueError(
                f"{name} has curvature_depends_on_upper = False, but which piece of its proximal map is active depends "
                "on the upper variables; leave it True in a ProximalProblem"
            )
        super().__init__(problem, upper, lower, *args, damping=damping, **options)
        if set(self.implicit) != set(lower) and not map_of(problem, tree.detach(upper)).separable:
            held = [variable for variable in lower if variable not in self.implicit]
            raise ValueError(
                f"implicit leaves out {held[:4]}, which the proximal map of {name} moves together with the others; "
                "leave implicit out, or give the map to the implicit variables alone by ByName"
            )

    @differentiates
    def cross(self, x: Params, upper: Params | None = None) -> Params:
        """``(dS/dx)' w`` over the upper variables."""
        smooth = super().cross(self._point.back(x), upper)
        return tree.sub(tree.scale(self._factor, smooth), self._point.back_to_upper(x))

    @differentiates
    def gradient_and_noise(self, upper: Params | None = None) -> tuple[Params, Tensor | None]:
        """S, and at most how far another choice of batches would typically move it: eta times the noise of dG/dy."""
        noise = super().gradient_and_noise(upper)[1]
        return self._point.residual(), None if noise is None else self._point.step * noise

    def standard_errors(self, x: Params) -> tuple[float, float] | None:
        return super().standard_errors(x) if len(self.lower_batches) > 1 else None

    def active_set(self) -> Tensor:
        return self._point.active_set()

    def flaw(self) -> str | None:
        residual, noise = self.gradient_and_noise()
        found = _not_solved(self, residual, noise, float(tree.norm(self.variables(self.lower))))
        if found is not None:
            return found
        point, largest = self._point, largest_entry(residual)
        limit = _DEGENERATE * max(largest, _rounding(residual) * point.size())
        near = sum(int((part.abs() <= limit).sum()) for part in point.distances.values())
        if not near:
            return None
        return (
            f"degenerate: {near} entries of y - eta dG/dy are within {limit:.1e} of a kink of the proximal map (least "
            f"distance {point.margin():.1e}, largest entry of y - T(x, y) {largest:.1e}), so that the active set, and "
            "with it the derivative, is not known there; solve the lower level more accurately. Where the distance "
            "stays 0, only one-sided derivatives exist at this x"
        )

    @cached_property
    def _factor(self) -> float:
        """What makes eta d2G/dydy of the operator of the smooth part, which is divided by its weight."""
        return self._point.step * self.weight

    @cached_property
    def _point(self) -> ProximalPoint:
        gradient = super().gradient_and_noise()[0]
        step = check_step_size(self.problem)
        return ProximalPoint(self.problem, self.upper, self.lower, self.implicit, gradient, step)

    def _reached_by_penalty(self, upper: Params) -> set[str]:
        return super()._reached_by_penalty(upper) | self._point.reached_upper

    def _without_tikhonov(self, point: Params) -> LinearOperator:
        return _ProximalOperator(super()._without_tikhonov(point), self._point, self._factor)


class _ProximalOperator(LinearOperator):
    """``w - u + factor A u`` with ``u = J' w``, for the operator A of the smooth part."""

    symmetric = False

    def __init__(self, smooth: LinearOperator, point: ProximalPoint, factor: float) -> None:
        self.smooth, self.point, self.factor = smooth, point, factor
        self.exact = smooth.exact

    def __call__(self, vector: Params) -> Params:
        moved = self.point.back(vector)
        return tree.axpy(self.factor, self.smooth(moved), tree.sub(vector, moved))

    def sampled(self, vector: Params) -> tuple[Params, Tensor | None]:
        moved = self.point.back(vector)
        product, error = self.smooth.sampled(moved)
        whole = tree.axpy(self.factor, product, tree.sub(vector, moved))
        return whole, None if error is None else self.factor * error

    def agree(self, flag: bool) -> bool:
        return self.smooth.agree(flag)


def _not_solved(
    system: ResidualSystem | ProximalSystem, residual: Params, noise: Tensor | None, size: float
) -> str | None:
    """That y is no solution, by the norm of the residual beside `size`; not where batches cannot tell it from 0."""
    norm, *known = tree.read(tree.norm(residual), *([] if noise is None else [noise]))
    negligible = max(_NO_SOLUTION * size, _rounding(residual) ** 0.5, 3.0 * sum(known))
    if norm <= negligible:
        return None
    is_root = not isinstance(system.problem, (FixedPointProblem, ProximalProblem))
    what, by, beside = ("root", "S(x, y)", "(dS/dy)' y") if is_root else ("fixed point", "y - T(x, y)", "y")
    return (
        f"no solution: y is no {what} of the lower level, ||{by}|| = {norm:.1e} beside ||{beside}|| = {size:.1e}, and "
        "the implicit function theorem is about one; solve the lower level further (more lower steps, or another "
        "solver: y may come from anywhere)"
    )


def _rounding(x: Params) -> float:
    return max(torch.finfo(leaf.dtype).eps for leaf in x.values())
