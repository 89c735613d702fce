"""Problems whose lower level is a smooth objective beside a constraint or a penalty that is not smooth."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.checks import check_kind, check_number
from bilevel.lower.kinds.maps import ProximalMap
from bilevel.lower.kinds.residual import ResidualProblem
from bilevel.tree import Params


class ProximalProblem(ResidualProblem):
    r"""A bilevel problem whose lower level is constrained or penalised:

    .. math:: y^*(x) \in \arg\min_y \; G(x, y) + h(x, y), \qquad G = L + \lambda r,

    with smooth L (`lower_objective`) and r (`regularizer`), and an h of which the proximal map is known, such as the
    indicator of a box or an L1 norm (`proximal_map`). y* is the fixed point of the proximal gradient step

    .. math:: T(x, y) = \operatorname{prox}_{\eta h(x, \cdot)}\big(y - \eta\, \partial G / \partial y\big)

    for every eta > 0 (`step_size`), and the hypergradient is that of the fixed point (Bertrand et al. 2020, 2022; Bolte
    et al. 2021): right on the active set, which is read from T(x, y). Over several batches, and over ranks, the
    gradient of G is averaged before the map, so that y* is that of the mean objective.

    A trainer's lower steps are ``torch.optim.SGD``'s, momentum allowed, each followed by the map with the step that the
    optimizer makes in the long run, lr / (1 - momentum): proximal stochastic gradients.
    """

    step_size: float
    """eta > 0. The hypergradient does not depend on it in exact arithmetic. Best near 1 / ||d2G/dydy||: the iteration T
    then converges, and y - T(x, y) says how far y is from y*."""

    @abstractmethod
    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        """L(x, y) on one batch, the smooth part without the regularizer; 0-d."""

    @abstractmethod
    def proximal_map(self, upper: Params) -> ProximalMap:
        """The proximal map of h(x, .), such as ``L1(upper["weight"].exp())``; its parameters may depend on x."""

    def residual(self, upper: Params, lower: Params, batch: Any) -> Params:
        """S = y - T(x, y) on one batch."""
        return tree.sub(lower, self.fixed_point_map(upper, lower, batch))

    def fixed_point_map(self, upper: Params, lower: Params, batch: Any) -> Params:
        """T(x, y) on one batch; it has a graph where gradients are recorded and a variable requires them."""
        step, recorded = check_step_size(self), torch.is_grad_enabled()
        recorded = recorded and any(leaf.requires_grad for leaf in (*upper.values(), *lower.values()))
        with torch.enable_grad():
            y = {n: leaf if leaf.requires_grad else leaf.detach().requires_grad_() for n, leaf in lower.items()}
            value, penalty = self.lower_objective(upper, y, batch), self.regularizer(upper, y)
            value = value if penalty is None else value + self.regularization_weight * penalty
            gradient = tree.gradients(value, y, create_graph=recorded)
        point = tree.axpy(-step, gradient, lower)
        return apply_map(self, upper, point if recorded else tree.detach(point), step)


def check_step_size(problem: ProximalProblem) -> float:
    """The step size.

    Raises:
        ValueError: it is missing or not a positive number.
    """
    name = type(problem).__name__
    step = getattr(problem, "step_size", None)
    check_number(f"{name}.step_size", step, positive=True)
    assert step is not None
    return float(step)


def map_of(problem: ProximalProblem, upper: Params) -> ProximalMap:
    """The problem's proximal map at x.

    Raises:
        TypeError: it is none.
    """
    found = problem.proximal_map(upper)
    check_kind(f"{type(problem).__name__}.proximal_map(upper)", found, ProximalMap, "a ProximalMap such as L1(0.1)")
    return found


def apply_map(problem: ProximalProblem, upper: Params, point: Params, step: float) -> Params:
    """prox at a point.

    Raises:
        ValueError: the map gave other names or shapes.
    """
    moved = map_of(problem, upper)(point, step)
    for name, leaf in point.items():
        if name not in moved or moved[name].shape != leaf.shape:
            shape = tuple(moved[name].shape) if name in moved else "nothing"
            raise ValueError(
                f"{type(problem).__name__}.proximal_map: the map gave {shape} for {name!r} of shape "
                f"{tuple(leaf.shape)}; a map keeps names and shapes (parameters broadcast against the variable)"
            )
    return {name: moved[name] for name in point}
