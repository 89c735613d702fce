"""A run's numbers in TensorBoard or Weights & Biases, beside or instead of `JSONLWriter`."""

import importlib
import math
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any, final

from bilevel.checks import check_kind, check_path
from bilevel.training.callbacks import Callback, Record


class TrackerError(RuntimeError):
    """A tracker's package is missing, or it cannot be started or written to; the message says what to do."""


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """``event/field -> value`` of an event's numeric fields but its step; what is not finite is left out."""
    return {
        f"{record['event']}/{name}": float(value)
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


class Tracker(Callback, ABC):
    """Sends the numbers of events to a viewer, with the event's ``step`` as x axis.

    As a trainer's callback it needs no more than to be in the list, before `Checkpointing`. Elsewhere: `restart` or
    `load_state_dict`, then `write` for each event, and `close`. After a resume no event is there twice.
    """

    @abstractmethod
    def start(self) -> None:
        """Begin, or go on; nothing where it has been done. Raises TrackerError where that fails."""

    @abstractmethod
    def write(self, record: Mapping[str, Any]) -> None:
        """Send the numbers of one event, which has "event" and "step"."""

    @abstractmethod
    def restart(self) -> None:
        """Forget what was written: the run begins anew."""

    @abstractmethod
    def close(self) -> None:
        """Send what is pending; a later `write` goes on."""

    def on_run_start(self, trainer: Any) -> None:
        self.start()

    def on_event(self, trainer: Any, record: Record) -> None:
        self.write(record)

    def on_run_end(self, trainer: Any) -> None:
        self.close()


@final
class TensorBoardLogger(Tracker):
    """Writes TensorBoard's event files; ``tensorboard --logdir`` a folder above shows each folder as a run of its own.

    A checkpoint holds the files' lengths, and resuming cuts them back, so that no event is there twice.

    Args:
        folder: of this run alone; it is made when the first event comes.

    Raises:
        TrackerError: TensorBoard is not installed; later, from every method: its files cannot be written to.
    """

    def __init__(self, folder: str | Path) -> None:
        check_path("TensorBoardLogger: folder", folder)
        self.folder = Path(folder)
        self._make, self._writer = _summary_writer(), None

    def start(self) -> None:
        if self._writer is None:
            with self._named_errors():
                self._writer = self._make(str(self.folder))

    def write(self, record: Mapping[str, Any]) -> None:
        self.start()
        assert self._writer is not None
        with self._named_errors():
            for tag, value in numbers(record).items():
                self._writer.add_scalar(tag, value, record["step"])

    def restart(self) -> None:
        self.load_state_dict({"files": {}})

    def close(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with self._named_errors():
                writer.close()

    def state_dict(self) -> dict[str, Any]:
        if self._writer is not None:
            with self._named_errors():
                self._writer.flush()
        return {"files": {path.name: path.stat().st_size for path in self._files()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.close()
        for path in self._files():
            length = state["files"].get(path.name)
            if length is None:
                path.unlink()
            elif path.stat().st_size > length:
                os.truncate(path, length)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrackerError(
                f"TensorBoard cannot write to {self.folder} ({error}); make room there, or name another folder"
            ) from error

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("events.out.tfevents.*"))


@final
class WandbLogger(Tracker):
    """Sends events to a run of Weights & Biases; its own settings (WANDB_MODE=offline, WANDB_ENTITY) hold.

    Nothing that was sent can be taken back there. A checkpoint holds the run's id and how many events came before it; a
    small file counts those that were sent, and after a resume as many are passed over. They are what was sent already,
    since a resumed run repeats itself exactly. An event that was being sent when the process died is lost.

    Args:
        folder: where W&B and the counts keep their files; runs may share it.
        project: W&B's project.
        name: what W&B calls the run; None lets it choose.
        group: what W&B groups runs by.
        config: the run's settings, to be shown with it.

    Raises:
        TrackerError: the package wandb is not installed; later, from every method: W&B or its folder fails.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        project: str,
        name: str | None = None,
        group: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        check_path("WandbLogger: folder", folder)
        check_kind("WandbLogger: config", config, (Mapping, NoneType), "a mapping of settings to values, or None")
        self.folder, self.project, self.name, self.group = Path(folder), project, name, group
        self.config = dict(config or {})
        self._wandb, self._run = _wandb(), None
        self._id, self._seen, self._events = uuid.uuid4().hex[:12], 0, set()

    def start(self) -> None:
        if self._run is not None:
            return
        with _named_errors("could not be started", "log in by 'wandb login', set WANDB_MODE=offline, or"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._run = self._wandb.init(
                project=self.project,
                name=self.name,
                group=self.group,
                config=self.config,
                dir=str(self.folder),
                id=self._id,
                resume="allow",
                reinit="create_new",
            )
        self._events = set()

    def write(self, record: Mapping[str, Any]) -> None:
        self.start()
        assert self._run is not None
        self._seen += 1
        if self._seen <= self._sent():
            return
        event = record["event"]
        with _named_errors("cannot go on", f"make room in {self.folder}, or"):
            # Before it is sent: rather lost than there twice.
            with self._count.open("ab") as file:
                file.write(b".")
            if event not in self._events:
                # Events have steps of their own, and W&B's only ever rises.
                self._events.add(event)
                self._run.define_metric(f"{event}/*", step_metric=f"{event}/step")
            self._run.log({**numbers(record), f"{event}/step": record["step"]})

    def restart(self) -> None:
        self.close()
        self._id, self._seen = uuid.uuid4().hex[:12], 0

    def close(self) -> None:
        if self._run is not None:
            run, self._run = self._run, None
            with _named_errors("cannot go on", f"make room in {self.folder}, or"):
                run.finish()

    def state_dict(self) -> dict[str, Any]:
        return {"id": self._id, "seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.close()
        self._id, self._seen = state["id"], state["seen"]

    @property
    def _count(self) -> Path:
        """A file of one byte for each event that was sent."""
        return self.folder / f"{self._id}.sent"

    def _sent(self) -> int:
        return self._count.stat().st_size if self._count.exists() else 0


@contextmanager
def _named_errors(what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # W&B's errors have no base class of their own.
        raise TrackerError(
            f"Weights & Biases {what} ({type(error).__name__}: {error}); {remedy} do without it"
        ) from error


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter  # an optional package
    except ImportError as error:
        raise TrackerError("TensorBoard is not installed: pip install 'bilevel[tensorboard]'") from error
    return SummaryWriter


def _wandb() -> Any:
    try:
        return importlib.import_module("wandb")  # an optional package
    except ImportError as error:
        raise TrackerError("the package wandb is not installed: pip install 'bilevel[wandb]'") from error
