"""What listens to a training run: metrics, progress, checkpoints."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bilevel.checkpoint import save_checkpoint

Record = dict[str, Any]
"""One event: ``event`` ("lower", "adaptation", "upper", "alternation"), ``step``, ``alternation``, and its numbers."""


class Callback:
    """Receives a trainer's events; the methods do nothing by default.

    `trainer` is passed as anything that has `state_dict`, `alternation` and `schedule`.
    """

    def on_run_start(self, trainer: Any) -> None:
        """Before the first alternation of this process."""

    def on_event(self, trainer: Any, record: Record) -> None:
        """After each lower step, adaptation and upper step, and at the end of each alternation."""

    def on_alternation_end(self, trainer: Any) -> None:
        """When the trainer is at a point from which a run can resume exactly."""

    def on_run_end(self, trainer: Any) -> None:
        """After the last alternation, and after an exception or an interrupt."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold for this callback."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""


class JSONLWriter(Callback):
    """Appends one JSON object per event to a file; numbers that are not finite become null.

    The checkpoint holds the file's length, and resuming cuts the file back to it, so that no event is there twice.

    Args:
        path: the file; its folder must exist.
        context: fields that every line carries, for example {"stage": "bissl", "seed": 0}.
    """

    def __init__(self, path: str | Path, context: Mapping[str, Any] | None = None) -> None:
        self.path, self.context = Path(path), dict(context or {})

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line."""
        line = json.dumps({**self.context, **{key: _finite(value) for key, value in record.items()}}, allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def on_event(self, trainer: Any, record: Record) -> None:
        self.write(record)

    def state_dict(self) -> dict[str, Any]:
        return {"length": self.path.stat().st_size if self.path.exists() else 0}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.path.exists() and self.path.stat().st_size > state["length"]:
            os.truncate(self.path, state["length"])


class ProgressBar(Callback):
    """A bar over the alternations with both levels' losses and the state of the last solve."""

    def __init__(self, console: Console | None = None, description: str = "bilevel") -> None:
        self.console, self.description = console, description
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._latest: dict[str, str] = {}

    def on_run_start(self, trainer: Any) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            *(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()),
            TextColumn("{task.fields[status]}"),
            console=self.console,
        )
        self._bar.start()
        total = trainer.schedule.alternations
        self._task = self._bar.add_task(self.description, total=total, completed=trainer.alternation, status="")

    def on_event(self, trainer: Any, record: Record) -> None:
        if record["event"] in ("lower", "upper"):
            self._latest[record["event"]] = f"{record['event']} {record['loss']:.4f}"
        if record["event"] == "upper" and record["status"] is not None:
            self._latest["solve"] = f"{record['status'].lower()}, residual {record['residual']:.1e}"
        if self._bar is not None and record["event"] == "alternation":
            self._bar.update(self._task, completed=record["alternation"], status="  ".join(self._latest.values()))

    def on_run_end(self, trainer: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Checkpointing(Callback):
    """Saves the trainer's state every so many alternations, and after the last; put it last in the list.

    Args:
        directory: where `save_checkpoint` writes and `load_checkpoint` looks.
        every: alternations between two checkpoints.
        keep: how many of the newest stay.
    """

    def __init__(self, directory: str | Path, *, every: int = 1, keep: int = 2) -> None:
        if every < 1:
            raise ValueError(f"Checkpointing: every must be at least 1 alternation, got {every}")
        self.directory, self.every, self.keep = Path(directory), every, keep

    def on_alternation_end(self, trainer: Any) -> None:
        if trainer.alternation % self.every == 0 or trainer.alternation == trainer.schedule.alternations:
            save_checkpoint(self.directory, trainer.alternation, trainer.state_dict(), keep=self.keep)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
