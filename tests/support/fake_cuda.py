"""A stand-in for a CUDA device that is as late as it may be: a copy is made when a stream first waits for it."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

CUDA = torch.device("cuda")


class Stream:
    """Work in the order in which it was queued."""

    def __init__(self, cuda: "FakeCuda") -> None:
        self.cuda, self.work = cuda, deque[Callable[[], object]]()

    def wait_event(self, event: "Event") -> None:
        assert self is self.cuda.current, "by the stream that computes"
        event.reach()


class Event:
    """A place in a stream's work."""

    def __init__(self) -> None:
        self.stream: Stream | None = None
        self.reached = False

    def record(self, stream: Stream) -> None:
        self.stream = stream
        stream.work.append(lambda: setattr(self, "reached", True))

    def reach(self) -> None:
        """Do the stream's work up to here."""
        assert self.stream is not None, "recorded before it is waited for"
        while not self.reached:
            self.stream.work.popleft()()


class FakeCuda:
    """While `patch` lasts, tensors that go to "cuda" are zeros of the CPU, until their copy is waited for.

    Attributes:
        pinned: how many tensors have been staged.
        copies: those on the device; `recorded` are those whose memory the computing stream has been named for.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.pinned, self.copies, self.recorded = 0, list[Tensor](), set[int]()
        self.default, self._staged = Stream(self), dict[int, Tensor]()
        self.current = self.default
        real = Tensor.to

        def to(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
            where = args[0] if args else options.get("device")
            if not isinstance(where, torch.device) or where.type != "cuda":
                return real(tensor, *args, **options)
            return self._copy(tensor, **options)

        patch.setattr(Tensor, "to", to)
        patch.setattr(Tensor, "pin_memory", lambda tensor: self._pin(tensor))
        patch.setattr(Tensor, "record_stream", lambda tensor, stream: self._record(tensor, stream))
        patch.setattr(torch.cuda, "Stream", lambda device: Stream(self))
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "stream", self._on)
        patch.setattr(torch.cuda, "current_stream", lambda device: self.current)

    def _pin(self, tensor: Tensor) -> Tensor:
        self.pinned += 1
        staged = tensor.clone()
        self._staged[id(staged)] = staged
        return staged

    def _copy(self, tensor: Tensor, *, non_blocking: bool = False) -> Tensor:
        assert non_blocking, "the host does not wait"
        assert id(tensor) in self._staged, "from pinned memory"
        assert self.current is not self.default, "beside what is computed"
        there = torch.zeros_like(tensor)
        self.current.work.append(lambda: there.copy_(tensor))
        self.copies.append(there)
        return there

    def _record(self, tensor: Tensor, stream: Stream) -> None:
        assert stream is self.default
        self.recorded.add(id(tensor))

    @contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def all_recorded(self) -> bool:
        """Whether the memory of every copy is kept for the computing stream."""
        return self.recorded == {id(copy) for copy in self.copies}
