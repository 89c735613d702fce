"""Copies of batches from the host to a device, which neither side waits for."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from bilevel.tree import map_tensors


@dataclass(frozen=True, eq=False)
class Arriving:
    """A batch on its way to a device."""

    _batch: Any
    _copies: tuple[Tensor, ...] = ()
    _event: torch.cuda.Event | None = None

    def take(self) -> Any:
        """The batch on the device, for the current stream, which waits for its copies; the host does not."""
        if self._event is not None:
            stream = torch.cuda.current_stream(self._copies[0].device)
            stream.wait_event(self._event)
            for copy in self._copies:
                # Its memory goes back to the copying stream only once this one is done with it.
                copy.record_stream(stream)
        return self._batch


@dataclass(frozen=True)
class Transfer:
    """Moves batches, nested structures of tensors, to a device.

    To a CUDA device every tensor on the host is staged in pinned memory of its own, unless it is pinned, and copied
    from there on a stream beside the one that computes. A copy that is begun while the device computes is made
    meanwhile, and the tensor may be written to or let go at once: torch gives a pinned buffer to nobody else before the
    copy from it is done. One that is pinned already is read until then, and must be left alone as long.

    Other devices take the tensors by ``Tensor.to``.
    """

    device: torch.device

    def __call__(self, batch: Any) -> Any:
        """The same structure with its tensors on the device; those that are there already are the same objects."""
        return self.begin(batch).take()

    def begin(self, batch: Any) -> Arriving:
        """Begin the copies; `Arriving.take` gives the batch to whoever computes with it."""
        if self.device.type != "cuda":
            return Arriving(map_tensors(lambda tensor: tensor.to(self.device), batch))
        copies: list[Tensor] = []

        def sent(tensor: Tensor) -> Tensor:
            if tensor.device.type != "cpu":
                return tensor.to(self.device)
            with torch.cuda.stream(self._stream):
                copy = tensor.pin_memory().to(self.device, non_blocking=True)
            copies.append(copy)
            return copy

        there = map_tensors(sent, batch)
        if not copies:
            return Arriving(there)
        event = torch.cuda.Event()
        event.record(self._stream)
        return Arriving(there, tuple(copies), event)

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)


@lru_cache
def transfer_to(device: torch.device) -> Transfer:
    """The one that all copies to a device go through, with one stream for them."""
    return Transfer(device)
