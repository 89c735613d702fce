"""DTensors of torch.distributed.tensor, tensors of which each rank has a shard: where they may stand, and where not."""

import sys
from collections.abc import Mapping

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def is_sharded(x: object) -> bool:
    """Whether this is a DTensor, whatever its placements. Nothing is imported: without its module there is none."""
    module = None if type(x) in _PLAIN else sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def whole(x: Tensor) -> Tensor:
    """The whole of a DTensor, on every rank, by an exchange; other tensors as they are.

    ``float`` of a DTensor that is a sum over ranks yet to be made reads this rank's part alone.
    """
    if type(x) in _PLAIN or not is_sharded(x):
        return x
    return x.full_tensor()  # type: ignore[attr-defined]


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner product, 0-d; of DTensors, which flattening would gather, perhaps a sum over ranks yet to be made."""
    if type(x) in _PLAIN or not is_sharded(x):
        return torch.dot(x.reshape(-1), y.reshape(-1))
    return (x * y).sum()


def check_whole(x: Mapping[str, Tensor]) -> None:
    """Raise TypeError where a leaf is a DTensor, for what needs vectors in one piece."""
    for name, leaf in x.items():
        if is_sharded(leaf):
            raise TypeError(
                f"{name!r} is a DTensor, of which each rank has a shard, and vectors in one piece are needed here; "
                "take a method that works leaf by leaf, such as CG() or Neumann(10), or plain tensors (full_tensor())"
            )


def check_variable(argument: str, leaf: Tensor) -> None:
    """Raise TypeError for a DTensor, which no variable of a level and no vector beside it may be."""
    if type(leaf) not in _PLAIN and is_sharded(leaf):
        raise TypeError(
            f"{argument} is a DTensor (FSDP2's fully_shard, tensor parallelism), and a level's variables must be whole "
            "on every rank: pass its full_tensor(), with each rank's own rows as the batch. Solvers alone take "
            "DTensors: CG().solve(operator, b), with products of your own"
        )
