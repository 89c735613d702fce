"""Collectives that keep the mathematics of one process on the global batch; the identity where there is one process.

Vectors of the solvers are replicated on all ranks: only means of losses, gradients and Hessian products, and stop
decisions, are exchanged.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from bilevel.tree import Params, flatten, unflatten


def world_size() -> int:
    """Number of ranks; 1 where torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(x: Params) -> Params:
    """Mean of `x` over the ranks, the same bits on every rank. One all-reduce of the flattened tree."""
    if world_size() == 1 or not x:
        return x
    vector = flatten(x)
    dist.all_reduce(vector)
    return unflatten(vector / world_size(), x)


def agree(flag: bool) -> bool:
    """Whether the flag is set on any rank, so that a decision to stop is taken by all or by none."""
    if world_size() == 1:
        return flag
    vote = torch.tensor(float(flag), device=_device())
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    return bool(vote.item())


def from_first_rank(number: int) -> int:
    """Rank 0's number on every rank, so that a choice made from timings is the same one everywhere."""
    if world_size() == 1:
        return number
    sent = torch.tensor(number, device=_device())
    dist.broadcast(sent, src=0)
    return int(sent.item())


def _device() -> torch.device:
    """Where the backend takes its tensors from."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


class _Gather(torch.autograd.Function):
    """Concatenation over ranks along dimension 0; its backward is a `_ReduceScatter`, so it differentiates again."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        return _ReduceScatter.apply(grads[0])


class _ReduceScatter(torch.autograd.Function):
    """Sum over ranks, each keeping its slice of dimension 0; its backward is a `_Gather`."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(world_size())[dist.get_rank()].clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        return _Gather.apply(grads[0])


def gather(x: Tensor) -> Tensor:
    """All ranks' `x`, concatenated along dimension 0 in the order of ranks; differentiable any number of times.

    The gradient with respect to the local `x` is the sum over ranks of the slice's gradients. A loss that every rank
    computes on the gathered tensor is therefore counted world_size times in a sum over ranks, once in a mean.
    Every rank must bring the same shape.

    Raises:
        RuntimeError: called under a torch.func transform (`ForwardOverReverse`), which cannot see through a collective.
    """
    if world_size() == 1:
        return x
    try:
        return _Gather.apply(x)
    except RuntimeError as error:
        if "functorch" not in str(error) and "setup_context" not in str(error):
            raise
        raise RuntimeError(
            "gather cannot run under torch.func transforms, where its collective is invisible; use "
            "hvp=ReverseOverReverse() for objectives that gather over ranks"
        ) from error
