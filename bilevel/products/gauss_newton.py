"""Gauss-Newton products for objectives that are a loss of a network's outputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel import tree
from bilevel.products.hvp import HVPProvider, Linearization, Objective, ReverseOverReverse
from bilevel.products.outputs import check_loss, differentiable, replaced
from bilevel.tree import Params


@final
@dataclass(frozen=True)
class ComposedObjective:
    """``L(x, y) = loss(x, outputs(x, y))`` on one fixed batch, its two parts being known apart.

    Attributes:
        outputs: (x, y) -> a tensor, or tensors in nested mappings, lists, tuples and dataclasses.
        loss: (x, outputs) -> 0-d.
        split: a number of samples -> `outputs` of each chunk of so many; their rows in order are those of `outputs`.
    """

    outputs: Callable[[Params, Params], Any]
    loss: Callable[[Params, Any], Tensor]
    split: Callable[[int], Sequence[Callable[[Params, Params], Any]]]

    def __call__(self, upper: Params, lower: Params) -> Tensor:
        return self.loss(upper, self.outputs(upper, lower))


@final
@dataclass(frozen=True)
class GaussNewton(HVPProvider):
    r"""Generalised Gauss-Newton products :math:`J^\top (\nabla_z^2 \ell) J w` for :math:`L(x, y) = \ell(x, z(x, y))`,
    with z the outputs, all their tensors together, and J = dz/dy (Schraudolph 2002).

    Positive semidefinite wherever the loss is convex in the outputs, whatever the network does; equal to the Hessian
    where the outputs are linear in y or the loss has no slope at them. Only d2L/dydy is replaced: gradients and the
    cross term stay exact. The Problem must define `lower_outputs` and `lower_output_loss`.

    Raises:
        TypeError: at `linearize`, an objective whose outputs are not known.
    """

    needs_outputs = True

    def linearize(self, objective: Objective, upper: Params, lower: Params) -> Linearization:
        if not isinstance(objective, ComposedObjective):
            raise TypeError(
                "GaussNewton needs the outputs and the loss of the lower objective apart; define lower_outputs and "
                "lower_output_loss in the Problem, or take ReverseOverReverse()"
            )
        return _GaussNewton(objective, upper, lower)


class _GaussNewton(Linearization):
    def __init__(self, objective: ComposedObjective, upper: Params, lower: Params) -> None:
        super().__init__(objective, upper, lower)
        self.composed = objective
        self._exact = ReverseOverReverse().linearize(objective, upper, lower)

    @torch.enable_grad()
    def hessian(self, vector: Params) -> Params:
        x, y = tree.detach(self.upper), tree.as_variables(self.lower)
        outputs = self.composed.outputs(x, y)
        z = {place: leaf for place, leaf in differentiable(outputs).items() if leaf.requires_grad}
        # J w as the derivative of J^T u in the dummy u: two reverse passes, no forward-mode rule needed.
        u = tree.as_variables(tree.zeros_like(z))
        transposed = tree.pullback(z, u, [y], create_graph=True)[0]
        pushed = tree.pullback(transposed, vector, [u], retain_graph=True)[0]
        point = tree.as_variables(z)
        loss = check_loss(self.composed.loss(x, replaced(outputs, point)), point)
        slope = tree.gradients(loss, point, create_graph=True)
        curved = tree.pullback(slope, pushed, [point])[0]
        return tree.pullback(z, curved, [y])[0]

    @torch.enable_grad()
    def gradient_near(self, lower: Params) -> Params:
        """J' dl/dz with the slope of the loss at other lower values, and J at the point."""
        x, y = tree.detach(self.upper), tree.as_variables(self.lower)
        z = {place: leaf for place, leaf in differentiable(self.composed.outputs(x, y)).items() if leaf.requires_grad}
        outputs = self.composed.outputs(x, tree.detach(lower))
        point = tree.as_variables({place: leaf for place, leaf in differentiable(outputs).items() if place in z})
        slope = tree.gradients(self.composed.loss(x, replaced(outputs, point)), point)
        return tree.pullback(z, slope, [y])[0]

    def cross(self, vector: Params, upper: Params) -> Params:
        return self._exact.cross(vector, upper)
