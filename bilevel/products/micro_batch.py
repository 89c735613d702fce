"""Exact derivatives of a loss over a whole batch, in the memory of a chunk of it.

Accumulating gradients over chunks changes a loss that compares samples, such as a contrastive one. Here the outputs are
computed chunk by chunk, the loss and its slope once on all of them, and the slope is then pulled back chunk by chunk
(the gradient cache of Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"), for
second derivatives too. No collective runs inside the loops over chunks: ranks may have different numbers of them, and a
loss that gathers over ranks does so once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bilevel import tree
from bilevel.checks import check_count
from bilevel.nn import chunk_seeds, training_pass
from bilevel.products.gauss_newton import ComposedObjective
from bilevel.products.graph import reached
from bilevel.products.hvp import HVPProvider, Linearization, Objective
from bilevel.tree import Params

Pass = Callable[[Params], Tensor]
"""The outputs of one chunk as a function of the variables."""


def micro_batched_gradient(
    outputs: Callable[[Params, Any], Tensor], loss: Callable[[Tensor], Tensor], variables: Params, chunks: Sequence[Any]
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
        outputs: ``(variables, chunk) -> z_c``, one row per sample of the chunk; two views make ``[n, 2, d]``.
        loss: z of the whole batch -> 0-d.
        chunks: the batch's parts in order (`Problem.split_batch`).

    Returns:
        The loss, detached, and its gradient; variables that the outputs do not use get zeros.

    Raises:
        TypeError: outputs that are not a tensor.
        ValueError: no chunks, or outputs with another number of rows than their chunk.
    """
    if not chunks:
        raise ValueError("chunks is empty; pass at least one part of the batch")
    seeds = chunk_seeds(int(torch.randint(2**31 - 1, ())), len(chunks))

    def passes(*, write_buffers: bool) -> list[Pass]:
        def one(chunk: Any, seed: int) -> Pass:
            def call(y: Params) -> Tensor:
                with training_pass(seed, write_buffers=write_buffers):
                    return check_rows(outputs(y, chunk), chunk)

            return call

        return [one(chunk, seed) for chunk, seed in zip(chunks, seeds, strict=True)]

    return _gradient(passes(write_buffers=False), passes(write_buffers=True), loss, variables)


@final
@dataclass(frozen=True)
class MicroBatched(HVPProvider):
    r"""Exact products for :math:`L(x, y) = \ell(z(x, y))` in chunks of samples, z having one row per sample.

    With u = dl/dz, :math:`\dot z = (\partial z/\partial y) w` and :math:`\dot u = (\partial^2 \ell/\partial z^2) \dot
    z`, which are taken on the whole batch:

    .. math:: \frac{\partial^2 L}{\partial y^2} w = \sum_c \frac{\partial}{\partial y} \left[ \left\langle
       \frac{\partial \langle u_c, z_c \rangle}{\partial y}, w \right\rangle + \langle \dot u_c, z_c \rangle \right],

    and d/dx of the same bracket for the cross term. The tangent takes forward mode, so that every operation of the
    outputs needs a forward-mode rule; the bracket takes reverse mode twice. For convolutional networks on a CPU a
    product costs 4.5 to 7 gradients, where one by `ReverseOverReverse` costs 3.5 to 4.5. The Problem must define
    `lower_outputs` and `lower_output_loss`. Random masks are drawn per chunk and the same in every product.

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
        self._gradient, product = self._product(vector, x, y, y)
        return product

    def cross(self, vector: Params, upper: Params) -> Params:
        x, y = tree.as_variables(upper), tree.as_variables(self.lower)
        return self._product(vector, x, y, x)[1]

    def gradient_at(self, upper: Params) -> Params:
        x = tree.detach(upper)
        passes: list[Pass] = [lambda y, outputs=outputs: outputs(x, y) for outputs in self.chunks]
        return _gradient(passes, passes, self.loss, self.lower)[1]

    @torch.enable_grad()
    def reached_upper(self) -> set[str]:
        x, y = tree.as_variables(self.upper), tree.as_variables(self.lower)
        return set().union(*(reached([outputs(x, y)], x) for outputs in self.chunks))

    @torch.enable_grad()
    def _product(self, vector: Params, x: Params, y: Params, wrt: Params) -> tuple[Params, Params]:
        """dL/dy, and the derivative of <dL/dy, vector> in `wrt`, which is x or y."""
        gradient, product = tree.zeros_like(y), tree.zeros_like(wrt)
        for outputs, (u, u_dot) in zip(self.chunks, self._slopes(vector, x), strict=True):
            z = outputs(x, y)
            g = tree.gradients((u * z).sum(), y, create_graph=True)
            gradient = tree.add(gradient, tree.detach(g))
            tagged = {f"slope of {name}": leaf for name, leaf in g.items()}
            directions = {f"slope of {name}": vector[name] for name in g}
            part = tree.pullback({"z": z, **tagged}, {"z": u_dot, **directions}, [wrt])[0]
            product = tree.add(product, part)
        return gradient, product

    def _slopes(self, vector: Params, upper: Params) -> list[tuple[Tensor, Tensor]]:
        """u and its tangent for every chunk."""
        x = tree.detach(upper)
        z, z_dot = [], []
        # Not torch.func.jvp: it hides the tensors' memory layout, in whose order a plain pass fills random masks.
        with torch.no_grad(), forward_ad.dual_level():
            y = {name: forward_ad.make_dual(leaf.detach(), vector[name]) for name, leaf in self.lower.items()}
            for outputs in self.chunks:
                value, tangent = forward_ad.unpack_dual(outputs(x, y))
                z.append(value)
                z_dot.append(torch.zeros_like(value) if tangent is None else tangent)
        point = {"z": torch.cat(z).requires_grad_()}
        slope = tree.gradients(self.loss(point["z"]), point, create_graph=True)
        curved = tree.pullback(slope, {"z": torch.cat(z_dot)}, [point])[0]
        rows = [len(part) for part in z]
        return list(zip(slope["z"].detach().split(rows), curved["z"].split(rows), strict=True))


@torch.enable_grad()
def _gradient(
    first: Sequence[Pass], second: Sequence[Pass], loss: Callable[[Tensor], Tensor], variables: Params
) -> tuple[Tensor, Params]:
    """The loss and its gradient; `first` are the passes without a graph, `second` those with one."""
    with torch.no_grad():
        z = [outputs(tree.detach(variables)) for outputs in first]
    point = {"z": torch.cat(z).requires_grad_()}
    value = loss(point["z"])
    slopes = tree.gradients(value, point)["z"].split([len(part) for part in z])
    y = tree.as_variables(variables)
    total = tree.zeros_like(y)
    for outputs, slope in zip(second, slopes, strict=True):
        total = tree.add(total, tree.pullback({"z": outputs(y)}, {"z": slope}, [y])[0])
    return value.detach(), total


def check_rows(outputs: object, chunk: Any) -> Tensor:
    """Raise unless the outputs of a chunk have a row for each sample; samples are counted where all tensors agree."""
    if not isinstance(outputs, Tensor):
        raise TypeError(f"lower outputs must be a tensor, got {type(outputs).__name__}")
    lengths = {tensor.shape[:1] for tensor in tree.tensors_in(chunk)}
    if outputs.dim() == 0 or (len(lengths) == 1 and outputs.shape[:1] not in lengths):
        raise ValueError(
            f"micro-batching needs outputs with one row per sample, got shape {tuple(outputs.shape)} for a chunk whose "
            f"tensors have the lengths {sorted(list(length) for length in lengths)}; stack views along dimension 1, as "
            "[n, views, d], and leave means over samples to the loss"
        )
    return outputs
