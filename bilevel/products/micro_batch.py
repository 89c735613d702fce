"""Exact derivatives of a loss over a whole batch, in the memory of a chunk of it.

Accumulating gradients over chunks changes a loss that compares samples, such as a contrastive one. Here the outputs are
computed chunk by chunk, the loss and its slope once on all of them, and the slope is then pulled back chunk by chunk
(the gradient cache of Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"), for
second derivatives too. No collective runs inside the loops over chunks: ranks may have different numbers of them, and a
loss that gathers over ranks does so once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bilevel import tree
from bilevel.checks import check_count
from bilevel.nn import chunk_seeds, training_pass
from bilevel.products.forward_mode import forward_mode
from bilevel.products.gauss_newton import ComposedObjective
from bilevel.products.graph import reached
from bilevel.products.hvp import HVPProvider, Linearization, Objective, ReverseOverReverse
from bilevel.products.outputs import check_loss, check_rows, differentiable, joined, replaced, split_rows
from bilevel.tree import Params

Pass = Callable[[Params], Any]
"""The outputs of one chunk as a function of the variables."""


def micro_batched_gradient(
    outputs: Callable[[Params, Any], Any], loss: Callable[[Any], Tensor], variables: Params, chunks: Sequence[Any]
) -> tuple[Tensor, Params]:
    r"""The value and the gradient of :math:`\ell(z(y))`, z the outputs of all chunks below each other; for training
    steps.

    With u = dl/dz: sum over chunks c of :math:`(\partial z_c / \partial y)^\top u_c`. The price over a plain gradient
    is one more forward pass: 1.6 to 2 gradients in all for convolutional networks on a CPU.

    Modules are bound by `functional_call`; their buffers are written once a chunk. Random masks are drawn per chunk
    from torch's default generators, the same ones in both passes. (Compiled code may draw others in the pass without a
    graph: do not compile outputs that have dropout.)

    Equal to the derivatives on the whole batch wherever samples meet in the loss alone. BatchNorm in train mode
    normalises each chunk by the chunk's own statistics and moves its running statistics once a chunk: a different
    model, of which this is the exact gradient. Freeze the statistics (eval mode) or use a normalisation within samples
    (LayerNorm, GroupNorm) to have the whole batch's model.

    Args:
        outputs: ``(variables, chunk) -> z_c``, a tensor or a structure of tensors (as `Problem.lower_outputs` may
            give) with one row per sample of the chunk; two views make ``[n, 2, d]``.
        loss: z of the whole batch -> 0-d.
        chunks: the batch's parts in order (`Problem.split_batch`).

    Returns:
        The loss, detached, and its gradient; variables that the outputs do not use get zeros.

    Raises:
        TypeError: outputs that are neither a tensor nor a structure of tensors.
        ValueError: no chunks, outputs with another number of rows than their chunk, or chunks whose outputs differ in
            structure or in what is no tensor.
    """
    if not chunks:
        raise ValueError("chunks is empty; pass at least one part of the batch")
    seeds = chunk_seeds(int(torch.randint(2**31 - 1, ())), len(chunks))

    def passes(*, write_buffers: bool) -> list[Pass]:
        def one(chunk: Any, seed: int) -> Pass:
            def call(y: Params) -> Any:
                with training_pass(seed, write_buffers=write_buffers):
                    return check_rows(outputs(y, chunk), chunk)

            return call

        return [one(chunk, seed) for chunk, seed in zip(chunks, seeds, strict=True)]

    return _gradient(passes(write_buffers=False), passes(write_buffers=True), loss, variables)


@final
@dataclass(frozen=True)
class MicroBatched(HVPProvider):
    r"""Exact products for :math:`L(x, y) = \ell(x, z(x, y))` in chunks of samples, every tensor of the outputs z having
    one row per sample.

    With u = dl/dz, :math:`\dot z = (\partial z/\partial y) w` and :math:`\dot u = (\partial^2 \ell/\partial z^2) \dot
    z`, which are taken on the whole batch:

    .. math:: \frac{\partial^2 L}{\partial y^2} w &= \sum_c \frac{\partial}{\partial y} \left[ \left\langle
       \frac{\partial \langle u_c, z_c \rangle}{\partial y}, w \right\rangle + \langle \dot u_c, z_c \rangle \right],
       \\ \frac{\partial^2 L}{\partial x \partial y} w &= \sum_c \frac{\partial}{\partial x} \left[ \left\langle
       \frac{\partial \langle u_c, z_c \rangle}{\partial y}, w \right\rangle + \langle \dot u_c, z_c \rangle \right]
       + \frac{\partial \langle u, \dot z \rangle}{\partial x},

    where :math:`u, \dot u` and :math:`\dot z` are constants in the brackets, and the last term is the derivative of
    :math:`u(x, z)` in the x that the loss itself takes, at constant z and :math:`\dot z`. The tangent takes forward
    mode, so that every operation of the outputs needs a forward-mode rule (a RuntimeError names the one that has
    none); the brackets take reverse mode twice. For convolutional networks on a CPU a product costs 4.5 to 7 gradients,
    where one by `ReverseOverReverse` costs 3.5 to 4.5. The Problem must define `lower_outputs` and `lower_output_loss`.
    Random masks are drawn per chunk and the same in every product.

    Equal to the whole batch's products wherever samples meet in the loss alone. BatchNorm in train mode normalises each
    chunk by the chunk's own statistics: a different model, of which these are the exact products. Freeze the statistics
    (eval mode), use a normalisation within samples, or accept it.

    Args:
        chunk_size: samples a chunk. Memory grows with it, and with the batch only through the outputs and the loss.

    Raises:
        ValueError: a chunk_size that is not a whole number of at least 1.
        TypeError: at `linearize`, an objective whose outputs are not known.
    """

    chunk_size: int
    needs_outputs = True

    def __post_init__(self) -> None:
        check_count("MicroBatched: chunk_size", self.chunk_size, least=1)

    def linearize(self, objective: Objective, upper: Params, lower: Params) -> Linearization:
        if not isinstance(objective, ComposedObjective):
            raise TypeError(
                "MicroBatched needs the outputs and the loss of the lower objective apart; define lower_outputs and "
                "lower_output_loss in the Problem, or take ReverseOverReverse()"
            )
        return _MicroBatched(objective, upper, lower, self.chunk_size)


class _MicroBatched(Linearization):
    def __init__(self, objective: ComposedObjective, upper: Params, lower: Params, chunk_size: int) -> None:
        super().__init__(objective, upper, lower)
        self.loss, self.chunks = objective.loss, objective.split(chunk_size)

    def hessian(self, vector: Params) -> Params:
        x, y = tree.detach(self.upper), tree.as_variables(self.lower)
        slopes, _ = self._slopes(vector, x, {})
        self._gradient, product = self._product(slopes, vector, x, y, y)
        return product

    def cross(self, vector: Params, upper: Params) -> Params:
        x, y = tree.as_variables(upper), tree.as_variables(self.lower)
        slopes, through_loss = self._slopes(vector, x, x)
        return tree.add(through_loss, self._product(slopes, vector, x, y, x)[1])

    def gradient_at(self, upper: Params) -> Params:
        x = tree.detach(upper)
        passes: list[Pass] = [lambda y, outputs=outputs: outputs(x, y) for outputs in self.chunks]
        return _gradient(passes, passes, lambda z: self.loss(x, z), self.lower)[1]

    @torch.enable_grad()
    def reached_upper(self) -> set[str]:
        x, y = tree.as_variables(self.upper), tree.as_variables(self.lower)

        def reached_by(z: Any) -> tuple[set[str], Any]:
            """Names, and the outputs without their graph, of which one shall live at a time."""
            tensors = differentiable(z)
            return reached(tensors.values(), x), replaced(z, tree.detach(tensors))

        found, parts = zip(*[reached_by(outputs(x, y)) for outputs in self.chunks], strict=True)
        return set().union(*found, reached([self.loss(x, joined(parts))], x))

    @torch.enable_grad()
    def _product(
        self, slopes: list[tuple[Params, Params]], vector: Params, x: Params, y: Params, wrt: Params
    ) -> tuple[Params, Params]:
        """dL/dy, and the derivative of <dL/dy, vector> in `wrt`, which is x or y, through the outputs."""
        gradient, product = tree.zeros_like(y), tree.zeros_like(wrt)
        for outputs, (u, u_dot) in zip(self.chunks, slopes, strict=True):
            z = differentiable(outputs(x, y))
            g = tree.pullback(z, u, [y], create_graph=True)[0]
            gradient = tree.add(gradient, tree.detach(g))
            part = tree.pullback(_tagged(output=z, slope=g), _tagged(output=u_dot, slope=vector), [wrt])[0]
            product = tree.add(product, part)
        return gradient, product

    @torch.enable_grad()
    def _slopes(self, vector: Params, x: Params, wrt: Params) -> tuple[list[tuple[Params, Params]], Params]:
        """u and its tangent for every chunk, and the derivative of <u, dz/dy vector> in `wrt` (x or nothing) through
        the loss alone."""
        parts, tangents = self._tangents(vector, tree.detach(x))
        rows, whole = [differentiable(part) for part in parts], joined(parts)
        point = tree.as_variables(differentiable(whole))
        loss = check_loss(self.loss(x, replaced(whole, point)), point)
        slope = tree.gradients(loss, point, create_graph=True)
        z_dot = {place: torch.cat([tangent[place] for tangent in tangents]) for place in point}
        curved, through_loss = tree.pullback(slope, z_dot, [point, wrt])
        slopes = zip(split_rows(tree.detach(slope), rows), split_rows(curved, rows), strict=True)
        return list(slopes), through_loss

    def _in_reverse(self, outputs: Callable[[Params, Params], Any], x: Params) -> Params:
        """A product of a loss of one chunk's outputs, to see whether these differentiate in reverse mode."""

        def loss(x: Params, y: Params) -> Tensor:
            parts = differentiable(outputs(x, y)).values()
            return torch.stack([(leaf * leaf.conj()).real.sum() for leaf in parts]).sum()

        return ReverseOverReverse().linearize(loss, x, self.lower).hessian(self.lower)

    def _tangents(self, vector: Params, x: Params) -> tuple[list[Any], list[Params]]:
        """Every chunk's outputs, and their tensors' derivatives along `vector`."""
        parts, tangents = [], []
        # Not torch.func.jvp: it hides the tensors' memory layout, in whose order a plain pass fills random masks.
        with torch.no_grad(), forward_ad.dual_level():
            y = {name: forward_ad.make_dual(leaf.detach(), vector[name]) for name, leaf in self.lower.items()}
            for outputs in self.chunks:
                with forward_mode("MicroBatched", partial(self._in_reverse, outputs, x)):
                    duals = outputs(x, y)
                pairs = {place: forward_ad.unpack_dual(leaf) for place, leaf in differentiable(duals).items()}
                parts.append(replaced(duals, {place: primal for place, (primal, _) in pairs.items()}))
                tangents.append(
                    {p: torch.zeros_like(primal) if dot is None else dot for p, (primal, dot) in pairs.items()}
                )
        return parts, tangents


@torch.enable_grad()
def _gradient(
    first: Sequence[Pass], second: Sequence[Pass], loss: Callable[[Any], Tensor], variables: Params
) -> tuple[Tensor, Params]:
    """The loss and its gradient; `first` are the passes without a graph, `second` those with one."""
    with torch.no_grad():
        parts = [outputs(tree.detach(variables)) for outputs in first]
    whole = joined(parts)
    point = tree.as_variables(differentiable(whole))
    value = check_loss(loss(replaced(whole, point)), point)
    slopes = split_rows(tree.gradients(value, point), [differentiable(part) for part in parts])
    y = tree.as_variables(variables)
    total = tree.zeros_like(y)
    for outputs, slope in zip(second, slopes, strict=True):
        total = tree.add(total, tree.pullback(differentiable(outputs(y)), slope, [y])[0])
    return value.detach(), total


def _tagged(**trees: Params) -> Params:
    """Several trees as one."""
    return {f"{kind} {name}": leaf for kind, named in trees.items() for name, leaf in named.items()}
