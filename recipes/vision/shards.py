"""Which rows of a batch this rank makes: its share of the training views, and of the inputs of an evaluation."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from bilevel.distributed import gather, shard, shard_sizes, world_size
from bilevel.tree import map_tensors

from .errors import DataError

Transform = Callable[..., Any]
"""``(images, ..., generator) -> batch``, as tasks give it."""

ROWS = {"rows", "count"}


@dataclass(frozen=True)
class SharedTransform:
    """A task's transform, which over several ranks makes this one's share of a batch.

    A transform with the keywords `rows` and `count` is given the share's images; so is one that changes nothing.
    Another one is given all of the batch, of which the share is kept. In one process nothing changes.

    Attributes:
        transform: the task's.
        task: its name, for messages.
        changes_nothing: whether it returns what it is given.
    """

    transform: Transform
    task: str
    changes_nothing: bool = False

    @cached_property
    def takes_rows(self) -> bool:
        """Whether the share's images are all it is given."""
        return self.changes_nothing or self._has_keywords

    def rows(self, count: int) -> slice:
        """The rows of a batch of `count` that are to be made."""
        return shard(count) if world_size() > 1 and self.takes_rows else slice(0, count)

    def of(self, rows: slice, count: int, *arguments: Any) -> Any:
        """What it makes of `rows` of a batch of `count`, given those alone."""
        return self.transform(*arguments, rows=rows, count=count) if self._has_keywords else self.transform(*arguments)

    @property
    def _has_keywords(self) -> bool:
        return inspect.signature(self.transform).parameters.keys() >= ROWS

    def __call__(self, count: int, *arguments: Any) -> Any:
        """The batch, or the share of it.

        Raises:
            DataError: it cannot be cut: a tensor of it has not `count` rows.
        """
        if world_size() == 1 or self.takes_rows:
            return self.of(self.rows(count), count, *arguments)
        remedy = "return one row an image in every tensor, or give transform the keywords rows and count"
        own, what = shard(count), f"the batch that {self.task} transforms"
        # Copies: a view would keep the whole batch in memory.
        return map_tensors(
            lambda tensor: _with_rows(tensor, count, what, remedy)[own].clone(), self.transform(*arguments)
        )


@dataclass(frozen=True)
class Rows:
    """This rank's rows of an evaluation's inputs, of a batch of `count`."""

    inputs: Any
    count: int


def evaluated_rows(count: int) -> slice:
    """The rows of an evaluation's batch that this rank computes: all of them where there are fewer than ranks."""
    return slice(0, count) if _is_whole(count) else shard(count)


def of_all_ranks(values: Any, count: int, what: str = "evaluation outputs") -> Any:
    """Tensors of a batch of `count` rows, from every rank's own rows, with autograd's history.

    Raises:
        DataError: over several ranks, a tensor that has not as many rows as the share.
    """
    if _is_whole(count):
        return values
    own, sizes = shard(count), shard_sizes(count)
    remedy = "evaluation over several processes needs one row a sample in every tensor"
    return map_tensors(lambda x: gather(_with_rows(x, own.stop - own.start, what, remedy), sizes), values)


def on_shards(forward: Callable[[Any], Any], rows: Rows) -> Any:
    """Outputs of `forward` on the whole batch, the same on every rank; each computes its own rows."""
    return of_all_ranks(forward(rows.inputs), rows.count)


def _is_whole(count: int) -> bool:
    ranks = world_size()
    return ranks == 1 or count < ranks


def _with_rows(tensor: Tensor, count: int, what: str, remedy: str) -> Tensor:
    if tensor.shape[:1] != (count,):
        raise DataError(f"{what}: a tensor of shape {tuple(tensor.shape)} does not have {count} rows; {remedy}")
    return tensor
