"""Gauss-Newton products for objectives that are a loss of a network's outputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel import tree
from bilevel.products.hvp import HVPProvider, Linearization, Objective, ReverseOverReverse
from bilevel.tree import Params


@final
@dataclass(frozen=True)
class ComposedObjective:
    """``L(x, y) = loss(outputs(x, y))`` on one fixed batch, its two parts being known apart.

    Attributes:
        split: a number of samples -> `outputs` of each chunk of so many; their rows in order are those of `outputs`.
    """

    outputs: Callable[[Params, Params], Tensor]
    loss: Callable[[Tensor], Tensor]
    split: Callable[[int], Sequence[Callable[[Params, Params], Tensor]]]

    def __call__(self, upper: Params, lower: Params) -> Tensor:
        return self.loss(self.outputs(upper, lower))


@final
@dataclass(frozen=True)
class GaussNewton(HVPProvider):
    r"""Generalised Gauss-Newton products :math:`J^\top (\nabla_z^2 \ell) J w` with z the outputs and J = dz/dy
    (Schraudolph 2002).

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
        y = tree.as_variables(self.lower)
        z = self.composed.outputs(tree.detach(self.upper), y)
        if not z.requires_grad:
            return tree.zeros_like(y)
        # J w as the derivative of J^T u in the dummy u: two reverse passes, no forward-mode rule needed.
        u = torch.zeros_like(z, requires_grad=True)
        transposed = _gradient([z], y, [u], create_graph=True)
        pushed = tree.pullback(transposed, vector, [{"u": u}], retain_graph=True)[0]["u"]
        point = z.detach().requires_grad_()
        slope = tree.gradients(self.composed.loss(point), {"z": point}, create_graph=True)
        curved = tree.pullback(slope, {"z": pushed}, [{"z": point}])[0]["z"]
        return _gradient([z], y, [curved], create_graph=False)

    @torch.enable_grad()
    def gradient_near(self, lower: Params) -> Params:
        """J' dl/dz with the slope of the loss at other lower values, and J at the point."""
        upper, y = tree.detach(self.upper), tree.as_variables(self.lower)
        z = self.composed.outputs(upper, y)
        if not z.requires_grad:
            return tree.zeros_like(y)
        point = self.composed.outputs(upper, tree.detach(lower)).detach().requires_grad_()
        slope = tree.gradients(self.composed.loss(point), {"z": point})["z"]
        return _gradient([z], y, [slope], create_graph=False)

    def cross(self, vector: Params, upper: Params) -> Params:
        return self._exact.cross(vector, upper)


def _gradient(outputs: list[Tensor], wrt: Params, vectors: list[Tensor], *, create_graph: bool) -> Params:
    values = torch.autograd.grad(
        outputs,
        list(wrt.values()),
        grad_outputs=vectors,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(wrt, values, strict=True))
