"""Signals that ask a run to stop: the step being made is finished, the state saved, and the process ends."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from bilevel import distributed

_MEMBERS = signal.Signals.__members__
SIGNALS = tuple(_MEMBERS[name] for name in ("SIGTERM", "SIGUSR1", "SIGINT") if name in _MEMBERS)
"""What asks for a stop: schedulers send the first two, Ctrl-C is the third."""


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop, and did so between two steps, where its state is whole.

    Attributes:
        signal: what asked for it, on this or another rank.
    """

    def __init__(self, asked_by: signal.Signals) -> None:
        super().__init__(f"stopped by {asked_by.name}")
        self.signal = asked_by


class Interruption:
    """While entered, this process's signals of `SIGNALS` raise `Interrupted`, inside `deferred` not before `check`.

    Of several ranks each waits for `check` everywhere, so that all stop at the same point.

    It is the handler itself, and what was there before is put back at the end. Ctrl-C after another signal stops at
    once, wherever the process is. Only the main thread can handle signals: entered in another one, it does nothing.
    """

    def __init__(self) -> None:
        self.asked_by: signal.Signals | None = None
        self.deferrals = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            # None stands for a handler that was not set from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def __call__(self, number: int, frame: FrameType | None) -> None:
        again = self.asked_by is not None and number == signal.SIGINT
        self.asked_by = self.asked_by or signal.Signals(number)
        if again:
            raise KeyboardInterrupt
        if self.deferrals == 0 and distributed.world_size() == 1:
            raise Interrupted(self.asked_by)


def installed() -> Interruption | None:
    """The `Interruption` that is entered in this process."""
    handler = signal.getsignal(signal.SIGTERM)
    return handler if isinstance(handler, Interruption) else None


def may_come() -> bool:
    """Whether `check` may raise: because of this process's signals, or of those of another rank."""
    return installed() is not None or distributed.world_size() > 1


@contextmanager
def deferred() -> Iterator[None]:
    """Until the end of the block, signals wait for the next `check`."""
    handler = installed()
    if handler is None:
        yield
        return
    handler.deferrals += 1
    try:
        yield
    finally:
        handler.deferrals -= 1


def check() -> None:
    """A point at which a run may stop: call it where the state is whole, on all ranks.

    Raises:
        Interrupted: this process, or that of another rank, was asked to.
    """
    handler = installed()
    asked_by = None if handler is None else handler.asked_by
    number = distributed.largest_over_ranks(0 if asked_by is None else int(asked_by))
    if number:
        raise Interrupted(signal.Signals(number))
