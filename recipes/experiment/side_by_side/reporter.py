"""How a worker process speaks: through a pipe to the run's process, which has the terminal."""

import io
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal, cast

from rich.console import Console

from bilevel.training import Callback

EVERY = 0.2
"""Seconds between two words on how far a training is."""

ColorSystem = Literal["standard", "256", "truecolor", "windows"]


@dataclass(frozen=True)
class Said:
    """Text for the terminal."""

    text: str


@dataclass(frozen=True)
class Reached:
    """How far a training is."""

    title: str
    completed: int
    total: int


@dataclass(frozen=True)
class Look:
    """What text is made for: columns, and colours if any."""

    width: int
    colours: str | None

    @classmethod
    def of(cls, console: Console) -> "Look":
        """That of a terminal."""
        return cls(console.width, console.color_system)


class Reporter:
    """What a worker has in place of a terminal."""

    def __init__(self, connection: Connection, look: Look) -> None:
        self._connection = connection
        # No terminal, on which bars would move: one that is finished is a line.
        self.console = Console(
            file=_Sent(connection),
            force_terminal=False,
            color_system=cast(ColorSystem | None, look.colours),
            width=look.width,
        )

    def watch(self, title: str) -> Callback:
        """A callback that says how far the training of this title is."""
        return _Watch(self._connection, title)


class _Sent(io.StringIO):
    """A file whose text is sent whenever it is flushed."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection

    def flush(self) -> None:
        if text := self.getvalue():
            self.seek(0)
            self.truncate()
            self._connection.send(Said(text))


class _Watch(Callback):
    def __init__(self, connection: Connection, title: str) -> None:
        self._connection, self._title, self._last = connection, title, 0.0

    def on_run_start(self, trainer: Any) -> None:
        self._send(trainer)

    def on_progress(self, trainer: Any) -> None:
        if time.monotonic() - self._last >= EVERY:
            self._send(trainer)

    def on_run_end(self, trainer: Any) -> None:
        self._send(trainer)

    def _send(self, trainer: Any) -> None:
        self._connection.send(Reached(self._title, trainer.progress, trainer.total))
        self._last = time.monotonic()
