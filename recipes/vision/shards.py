"""Which rows of a batch this rank computes: its share of the training views, and of the outputs of an evaluation."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from bilevel.distributed import gather, shard, shard_sizes, world_size
from bilevel.tree import map_tensors, tensors_in

from .imagesets import DataError

Transform = Callable[..., Any]
"""``(images, generator) -> batch`` or ``(images, targets, generator) -> batch``, as tasks give them."""


def views_of_shard(transform: Transform, task: str) -> Transform:
    """`transform`, to be called with the whole batch's images as before, making this rank's share of the batch alone.

    A transform that takes the keyword `rows` draws for the whole batch and computes the share. Another one computes the
    whole batch, of which the share is kept. The generator moves on alike, and in one process nothing changes.

    Args:
        task: name of the task, for messages.

    Raises:
        DataError: when the result is called, over several ranks, for a transform without `rows` whose batch has a
            tensor that cannot be cut: it has not as many rows as there are images.
    """
    takes_rows = "rows" in inspect.signature(transform).parameters

    def views(images: Tensor, *others: Any) -> Any:
        if world_size() == 1:
            return transform(images, *others)
        rows = shard(len(images))
        if takes_rows:
            return transform(images, *others, rows=rows)
        remedy = "return one row an image in every tensor, or give the function that transform returns a keyword rows"
        return _cut(transform(images, *others), len(images), rows, f"the batch that {task} transforms", remedy)

    return views


def on_shards(forward: Callable[[Any], Any], inputs: Any) -> Any:
    """Outputs of `forward` on a whole batch of `inputs`, the same on every rank; each rank computes its share of rows.

    Inputs and outputs are tensors, or nested structures of them, with one row for each of N samples, which do not
    depend on one another. Where N is below the number of ranks, every rank computes all of it. Autograd's history is
    kept: call it without gradients where none are wanted.

    Raises:
        DataError: over several ranks, if a tensor of the inputs has not N rows, or one of the outputs not the share's.
    """
    count, ranks = len(next(tensors_in(inputs))), world_size()
    if ranks == 1 or count < ranks:
        return forward(inputs)
    own = shard(count)
    remedy = "evaluation over several processes needs one row a sample in every tensor"
    outputs = forward(_cut(inputs, count, own, "evaluation inputs", remedy))
    local = own.stop - own.start
    return map_tensors(
        lambda x: gather(_with_rows(x, local, "evaluation outputs", remedy), shard_sizes(count)), outputs
    )


def _cut(batch: Any, count: int, rows: slice, what: str, remedy: str) -> Any:
    """`rows` of every tensor of the batch, as copies: a view would keep the whole batch in memory."""
    return map_tensors(lambda tensor: _with_rows(tensor, count, what, remedy)[rows].clone(), batch)


def _with_rows(tensor: Tensor, count: int, what: str, remedy: str) -> Tensor:
    if tensor.shape[:1] != (count,):
        raise DataError(f"{what}: a tensor of shape {tuple(tensor.shape)} does not have {count} rows; {remedy}")
    return tensor
