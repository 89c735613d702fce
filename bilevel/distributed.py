"""Collectives that keep the mathematics of one process on the global batch; the identity where there is one process.

Vectors of the solvers are replicated on all ranks: only means of losses, gradients and Hessian products, gathered
outputs, and decisions are exchanged. Every rank must call the functions here in the same order.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bilevel.sharded import is_sharded
from bilevel.tree import Params, flatten, unflatten, wide

T = TypeVar("T")


class CollectiveError(RuntimeError):
    """An exchange between the ranks failed: one of them has ended, stands still, or cannot be reached."""


def world_size() -> int:
    """Number of ranks; 1 where torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among the ranks, from 0; 0 where torch.distributed is not initialised."""
    return dist.get_rank() if world_size() > 1 else 0


def shard(count: int) -> slice:
    """The rows of a global batch of `count` that are this rank's: contiguous and in the order of ranks, as many as
    `shard_sizes` says. All rows where there is one process."""
    sizes, own = shard_sizes(count), rank()
    first = sum(sizes[:own])
    return slice(first, first + sizes[own])


def shard_sizes(count: int) -> tuple[int, ...]:
    """Each rank's number of rows of a batch of `count`; they differ by at most one, the first ranks' being larger."""
    least, more = divmod(count, world_size())
    return tuple(least + (number < more) for number in range(world_size()))


def mean_over_ranks(x: Params) -> Params:
    """Mean of `x` over the ranks, the same bits on every rank. One all-reduce of the flattened tree.

    A DTensor is one tensor of all ranks, and stays as it is.
    """
    own = {name: leaf for name, leaf in x.items() if not is_sharded(leaf)}
    if world_size() == 1 or not own:
        return x
    vector = flatten(own)
    with _collective():
        dist.all_reduce(vector)
    mean = unflatten(vector / world_size(), own)
    return {name: mean.get(name, leaf) for name, leaf in x.items()}


def mean_with_gradients(value: Tensor, *gradients: Params) -> tuple[Tensor, *tuple[Params, ...]]:
    """`mean_over_ranks` of a 0-d value and of its gradients, in one exchange."""
    if world_size() == 1:
        return value, *gradients
    parts = {f"{place} {name}": leaf for place, part in enumerate(gradients) for name, leaf in part.items()}
    mean = mean_over_ranks({"value": value, **parts})
    return mean["value"], *({name: mean[f"{place} {name}"] for name in part} for place, part in enumerate(gradients))


def agree(flag: bool) -> bool:
    """Whether the flag is set on any rank, so that a decision to stop is taken by all or by none."""
    return bool(largest_over_ranks(int(flag)))


def largest_over_ranks(number: int) -> int:
    """The largest of the ranks' numbers."""
    if world_size() == 1:
        return number
    vote = torch.tensor(number, device=_control_device())
    with _collective():
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    return int(vote.item())


def from_first_rank(number: int) -> int:
    """Rank 0's number on every rank, so that a choice made from timings is the same one everywhere."""
    if world_size() == 1:
        return number
    sent = torch.tensor(number, device=_control_device())
    with _collective():
        dist.broadcast(sent, src=0)
    return int(sent.item())


def on_first_rank(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, on every rank; it is called there alone, for example to read a file.

    The value is made of tensors, numbers, strings and None in nested dictionaries, lists and tuples; tensors arrive on
    the CPU. Where `make` raises, the other ranks fail with CollectiveError once rank 0 has ended.
    """
    if world_size() == 1:
        return make()
    value: Any = make() if rank() == 0 else None
    buffer = io.BytesIO()
    if rank() == 0:
        torch.save({"value": value}, buffer)
    content = torch.frombuffer(bytearray(buffer.getvalue() or b"\0"), dtype=torch.uint8)
    size = from_first_rank(len(content))
    content = (content if rank() == 0 else content.new_empty(size)).to(_control_device())
    with _collective():
        dist.broadcast(content, src=0)
    if rank() == 0:
        return value
    return torch.load(io.BytesIO(content.cpu().numpy().tobytes()), map_location="cpu", weights_only=True)["value"]


@torch.no_grad()
def replicate(tensors: Iterable[Tensor]) -> None:
    """Give every rank rank 0's values, in place: parameters and buffers before the first step, for example."""
    if world_size() == 1:
        return
    for tensor in tensors:
        # A collective takes no strided view, and no optional memory format.
        sent = tensor.detach().contiguous()
        with _collective():
            dist.broadcast(sent, src=0)
        tensor.copy_(sent)


def check_replicated(name: str, x: Params) -> None:
    """Raise ValueError, naming the leaf, where `x` is not the same on this rank as on the first."""
    if world_size() == 1:
        return
    own = {leaf: [float(wide(value.detach()).sum()), list(value.shape)] for leaf, value in x.items()}
    first = on_first_rank(lambda: own)
    wrong = [leaf for leaf in {**own, **first} if repr(own.get(leaf)) != repr(first.get(leaf))]
    if wrong:
        raise ValueError(
            f"{name}[{wrong[0]!r}] has other values on rank {rank()} than on rank 0; start all from the same ones, for "
            f"example by bilevel.distributed.replicate({name}.values())"
        )


def gather(x: Tensor, rows: Sequence[int] | None = None) -> Tensor:
    """All ranks' `x`, concatenated along dimension 0 in the order of ranks; differentiable any number of times.

    The gradient with respect to the local `x` is the sum over ranks of the slice's gradients. A loss that every rank
    computes on the gathered tensor is therefore counted world_size times in a sum over ranks, once in a mean.
    Shapes must agree but for the number of rows.

    Args:
        rows: how many rows each rank brings; None asks the ranks, which is one more exchange.

    Raises:
        RuntimeError: called under a torch.func transform (`ForwardOverReverse`), which cannot see through a collective.
    """
    if world_size() == 1:
        return x
    try:
        return _Gather.apply(x, rows_of_all(len(x)) if rows is None else tuple(rows))
    except RuntimeError as error:
        if "functorch" not in str(error) and "setup_context" not in str(error):
            raise
        raise RuntimeError(
            "gather cannot run under torch.func transforms, where its collective is invisible; use "
            "hvp=ReverseOverReverse() for objectives that gather over ranks"
        ) from error


def rows_of_all(count: int) -> tuple[int, ...]:
    """Every rank's `count`, in the order of ranks."""
    if world_size() == 1:
        return (count,)
    own = torch.tensor([count], device=_control_device())
    parts = [torch.empty_like(own) for _ in range(world_size())]
    with _collective():
        dist.all_gather(parts, own)
    return tuple(torch.cat(parts).tolist())


class _Gather(torch.autograd.Function):
    """Concatenation over ranks along dimension 0; its backward is a `_ReduceScatter`, so it differentiates again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: tuple[int, ...]) -> Tensor:
        ctx.rows = rows
        # Collectives want one shape: shorter parts are filled up, and cut again.
        missing = max(rows) - len(x)
        sent = torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x.contiguous()
        parts = [torch.empty_like(sent) for _ in rows]
        with _collective():
            dist.all_gather(parts, sent)
        return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _ReduceScatter.apply(grads[0], ctx.rows), None


class _ReduceScatter(torch.autograd.Function):
    """Sum over ranks, each keeping its slice of dimension 0; its backward is a `_Gather`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: tuple[int, ...]) -> Tensor:
        ctx.rows = rows
        total = x.contiguous().clone()
        with _collective():
            dist.all_reduce(total)
        return total.split(rows)[rank()].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(grads[0], ctx.rows), None


def _control_device() -> torch.device:
    """Where small messages go from: the CPU where the group takes its tensors, so that no GPU is waited for."""
    # "cpu:gloo,cuda:nccl" takes both, "nccl" alone only the GPU's.
    if "cpu:" in dist.get_backend_config():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def _collective() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise CollectiveError(f"an exchange between the ranks failed ({str(error).splitlines()[0]})") from error
