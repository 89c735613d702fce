"""The events of a stage, written as lines of the run's `metrics.jsonl` and to trackers."""

import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from bilevel.checkpoint import write_atomic
from bilevel.distributed import rank
from bilevel.training import Callback, JSONLWriter, Tracker, TrackerError

from .errors import ConfigError

LOCK = ".metrics.lock"
"""File beside the events that is locked while one of several processes writes there."""

MOST_LINES = 2000
"""Upper bound on the "train" events that one stage writes."""


class StageEvents(Callback):
    """Appends a stage's events, each with the stage's `context`, to a file that all stages share.

    A checkpoint holds how many lines the stage had written. Resuming drops those that it wrote later, and no line of
    another stage: stages may finish in another order than before the interruption, when some were added.

    Of several ranks the first writes.

    Args:
        path: the file; its folder must exist.
        context: fields that tell the stage's lines from all others.
        trackers: viewers that get the events too, by name. One that is added on resume gets what comes from then on.
        shared: whether other processes of this machine write their stages' events to the file meanwhile.

    Every method raises ConfigError where a tracker cannot be started or written to.
    """

    def __init__(
        self,
        path: Path,
        context: Mapping[str, Any],
        trackers: Mapping[str, Tracker] | None = None,
        *,
        shared: bool = False,
    ) -> None:
        self.path, self.context, self.trackers, self.shared = path, dict(context), dict(trackers or {}), shared
        self._writer, self._lines = JSONLWriter(path, context), 0

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line."""
        with self._alone():
            self._writer.write(record)
        self._lines += 1
        with _named_errors():
            for tracker in self.trackers.values():
                tracker.write(record)

    def restart(self) -> None:
        """Drop what an earlier run of the stage wrote."""
        self._keep(0)
        with _named_errors():
            for tracker in self.trackers.values():
                tracker.restart()
        self._start()

    def on_new_run(self, trainer: Any) -> None:
        self.restart()

    def close(self) -> None:
        """Send what is pending."""
        with _named_errors():
            for tracker in self.trackers.values():
                tracker.close()

    @property
    def name(self) -> str:
        """The context in one word, for names of files: its values, numbers with their names, as in ``fit-seed-0``."""
        return "-".join(value if isinstance(value, str) else f"{key}-{value}" for key, value in self.context.items())

    def on_event(self, trainer: Any, record: dict[str, Any]) -> None:
        # Of a long training of one level, `MOST_LINES` steps at most and those that were left out.
        every = math.ceil(trainer.total / MOST_LINES) if record["event"] == "train" else 1
        if record["step"] % every == 0 or record["step"] == trainer.total or "skipped" in record:
            self.write(record)

    def on_run_end(self, trainer: Any) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        with _named_errors():
            states = {name: tracker.state_dict() for name, tracker in self.trackers.items()}
        return {"lines": self._lines, "trackers": states} if states else {"lines": self._lines}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._keep(state["lines"])
        saved = state.get("trackers", {})
        with _named_errors():
            for name, tracker in self.trackers.items():
                if name in saved:
                    tracker.load_state_dict(saved[name])
                else:
                    tracker.restart()
        self._start()

    def _start(self) -> None:
        """Now rather than at the first event, so that what is wrong shows before anything is computed."""
        with _named_errors():
            for tracker in self.trackers.values():
                tracker.start()

    def _keep(self, count: int) -> None:
        """Keep the first `count` lines of this stage and everything of the others."""
        self._lines = 0
        if rank() > 0:
            return
        with self._alone():
            lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
            kept = []
            for line in lines:
                own = self._is_own(line)
                if own is None or (own and self._lines == count):
                    continue
                self._lines += own
                kept.append(line)
            if len(kept) < len(lines):
                write_atomic(self.path, b"".join(kept))

    def _alone(self) -> AbstractContextManager[None]:
        """The file is another one after it was cut: nobody may append to it meanwhile."""
        return _locked(self.path.with_name(LOCK)) if self.shared else nullcontext()

    def _is_own(self, line: bytes) -> bool | None:
        """Whether the line is this stage's; None where it was cut off while being written."""
        if not line.endswith(b"\n"):
            return None
        record = json.loads(line)
        return all(record.get(name) == value for name, value in self.context.items())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        # Which unlocks it.
        os.close(descriptor)


@contextmanager
def _named_errors() -> Iterator[None]:
    try:
        yield
    except TrackerError as error:
        raise ConfigError(
            f"tracking: {error}. The same command with --resume goes on, with --tracking '' without a viewer"
        ) from error
