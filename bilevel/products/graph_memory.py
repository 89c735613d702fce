"""Memory of kept autograd graphs: measured, and booked against a budget."""

from collections.abc import Iterable, Iterator
from functools import cache
from math import inf
from typing import final

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import Node

from bilevel import distributed, tree
from bilevel.products.graph import graph_nodes


def graph_bytes(outputs: Iterable[Tensor], resident: Iterable[Tensor] = ()) -> int:
    """Bytes that live only because the autograd graph of `outputs` does.

    Every node that the outputs lead to is visited, and each storage that it saved for backward passes counts once and
    whole, on whatever device it is. Not counted: nodes themselves (about a kilobyte each), an allocator's rounding,
    the storages of `outputs`, sparse tensors, and what a custom function keeps elsewhere than in ``saved_tensors`` or
    its attributes. The visit costs about 5 microseconds a node, a hundredth to a tenth of one gradient.

    Args:
        resident: tensors that live anyway (variables, batches) and whose storages therefore do not count.

    Raises:
        RuntimeError: the graph was freed, or a saved tensor was overwritten.
    """
    outputs = list(outputs)
    storages: dict[int, int] = {}
    for node in graph_nodes(outputs):
        storages |= _storages(_saved(node))
    for address in _storages((*outputs, *resident)):
        storages.pop(address, None)
    return sum(storages.values())


@final
class GraphAccount:
    """Books graphs against one limit, first come, first served; what it holds never exceeds the limit.

    Args:
        limit: bytes; infinity is no limit.
        resident: as in `graph_bytes`.
    """

    def __init__(self, limit: float, resident: Iterable[Tensor] = ()) -> None:
        self.limit, self.held = limit, 0
        self.resident = tuple(resident)

    def admits(self, outputs: Iterable[Tensor]) -> bool:
        """Whether the graph of `outputs` still fits, on every rank; if so it is booked. Without a limit nothing is
        measured."""
        if self.limit == inf:
            return True
        size = graph_bytes(outputs, self.resident)
        # Graphs that are kept exchange less than those that are made again.
        if distributed.agree(self.held + size > self.limit):
            return False
        self.held += size
        return True


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address and bytes of the storages of dense tensors."""
    dense = [tensor.untyped_storage() for tensor in tensors if tensor.layout is torch.strided]
    return {storage.data_ptr(): storage.nbytes() for storage in dense}


def _saved(node: Node) -> Iterator[Tensor]:
    for name in _saved_names(type(node)):
        yield from tree.tensors_in(getattr(node, name))
    if isinstance(node, FunctionCtx):
        yield from tree.tensors_in(vars(node))


@cache
def _saved_names(kind: type[Node]) -> tuple[str, ...]:
    """Names under which nodes of one type show what they saved."""
    return tuple(name for name in dir(kind) if name.startswith("_saved_") or name == "saved_tensors")
