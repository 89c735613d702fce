"""Batches that are begun before they are drawn: a training's, in shuffled order, and an evaluation's, in order."""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar, final

import torch
from torch import Tensor

from bilevel import BatchStack
from bilevel.training import BatchSource

Begun = TypeVar("Begun")
Drawn = tuple[Tensor, int]
"""Points of a batch, int64 [N], and the seed of its random draws."""


@final
class PrefetchedStack(BatchSource, Generic[Begun]):
    """A `BatchStack` of which the next few batches are always under way.

    Which ones they are follows from where the stack stands, from the length of the stage and from the length of the
    whole training, every stage being as long as the one before; nothing is begun that will not be drawn. A state holds
    the place of the batch that is drawn next, whatever is under way.

    Args:
        stack: whose `load` gives its arguments, (indices, seed); see `order_of`.
        begin: ``begin(indices, seed)`` starts what makes a batch, and does not wait.
        finish: the batch itself; may wait.
        give_up: what to do with a batch under way that is not wanted after all, where a state is loaded.
        total: batches of the whole training.
        ahead: batches under way besides the one that is drawn.
        room: ``room(indices)``, whether a batch may be begun ahead now; the next one always may.
        send: sends a batch under way to the device, as far as it is made; None: there is nowhere to send it.
    """

    def __init__(
        self,
        stack: BatchStack,
        begin: Callable[[Tensor, int], Begun],
        finish: Callable[[Begun, int], Any],
        give_up: Callable[[Begun], None],
        *,
        total: int,
        ahead: int = 2,
        room: Callable[[Tensor], bool] = lambda indices: True,
        send: Callable[[Begun], None] | None = None,
    ) -> None:
        self.stack, self.total, self.ahead = stack, total, ahead
        self._begin, self._finish, self._give_up, self._room, self._send = begin, finish, give_up, room, send
        self._under_way: dict[int, Begun] = {}
        self._drawn = self._in_stage = self._stage = 0

    def __len__(self) -> int:
        """Batches in one shuffle."""
        return len(self.stack)

    def begin_stage(self, steps: int) -> None:
        self.stack.begin_stage(steps)
        self._stage, self._in_stage = steps, 0

    def next(self) -> Any:
        indices, seed = self.stack.next()
        self._drawn, self._in_stage = self._drawn + 1, self._in_stage + 1
        begun = self._under_way.pop(seed, None)
        begun = self._begin(indices, seed) if begun is None else begun
        self._fill()
        return self._finish(begun, seed)

    def prepare(self) -> None:
        """Send the batch that is drawn next, if it is under way, so that it arrives while the device computes."""
        for _, seed in itertools.islice(self._upcoming() if self._send else (), 1):
            if self._send is not None and seed in self._under_way:
                self._send(self._under_way[seed])

    @property
    def last_indices(self) -> Tensor | None:
        return self.stack.last_indices

    def close(self) -> None:
        for begun in self._under_way.values():
            self._give_up(begun)
        self._under_way = {}

    def state_dict(self) -> dict[str, Any]:
        return {
            **self.stack.state_dict(),
            "drawn": self._drawn,
            "stage": self._stage,
            "in_stage": self._in_stage,
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        self.check_fields(state)
        self.stack.check_state({name: state[name] for name in self.stack.state_dict()})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.check_state(state)
        self.stack.load_state_dict({name: state[name] for name in self.stack.state_dict()})
        self._drawn, self._stage, self._in_stage = state["drawn"], state["stage"], state["in_stage"]

    def _fill(self) -> None:
        """Begin what will be drawn next, as far as there is room."""
        coming = dict[int, Begun]()
        for indices, seed in self._upcoming():
            if seed not in self._under_way and coming and not self._room(indices):
                break
            found = self._under_way.pop(seed, None)
            coming[seed] = self._begin(indices, seed) if found is None else found
        self.close()
        self._under_way = coming

    def _upcoming(self) -> Iterator[Drawn]:
        stack, in_stage = copy.copy(self.stack), self._in_stage
        for _ in range(min(self.ahead, self.total - self._drawn)):
            if self._stage and in_stage == self._stage:
                stack.begin_stage(self._stage)
                in_stage = 0
            in_stage += 1
            yield stack.next()


def order_of(size: int, batch_size: int, *, seed: int, drop_last: bool = False) -> BatchStack:
    """The order of a stack's batches alone: it gives (indices, seed)."""
    return BatchStack(size, batch_size, _drawn, seed=seed, drop_last=drop_last)


def _drawn(indices: Tensor, seed: int) -> Drawn:
    return indices, seed


class InOrder(Generic[Begun]):
    """A whole set in order, batch by batch, as often as it is iterated; the next two are always under way.

    Args:
        size: points.
        batch_size: points a batch; the last one may be smaller.
        begin, finish, give_up: as for `PrefetchedStack`, without a seed.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        begin: Callable[[Tensor], Begun],
        finish: Callable[[Begun], Any],
        give_up: Callable[[Begun], None],
        ahead: int = 2,
    ) -> None:
        self.size, self.batch_size, self.ahead = size, batch_size, ahead
        self._begin, self._finish, self._give_up = begin, finish, give_up

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        under_way = deque[Begun]()
        try:
            for first in range(0, self.size, self.batch_size):
                under_way.append(self._begin(torch.arange(first, min(first + self.batch_size, self.size))))
                if len(under_way) > self.ahead:
                    yield self._finish(under_way.popleft())
            while under_way:
                yield self._finish(under_way.popleft())
        finally:
            for begun in under_way:
                self._give_up(begun)
