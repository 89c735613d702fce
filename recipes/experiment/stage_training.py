"""A training by bilevel's engine as part of a stage: its events, progress, time and checkpoints."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from bilevel import Checkpointing, ProgressBar
from bilevel.training import Callback, Inspect, NonFiniteError, Training

from .events import StageEvents
from .stage import Attempt
from .workspace import Workspace

T = TypeVar("T", bound=Training)


class Seconds(Callback):
    """Wall-clock seconds of a training, over all the processes that worked on it."""

    def __init__(self) -> None:
        self._before, self._began = 0.0, time.perf_counter()

    def total(self) -> float:
        """Seconds so far."""
        return self._before + time.perf_counter() - self._began

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.total()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._before, self._began = state["seconds"], time.perf_counter()


class _Waiting(Callback):
    """Notes at the end how much of the time since the start, or since the last resume, went by waiting for data."""

    def __init__(self, events: StageEvents) -> None:
        self.events, self._began = events, time.perf_counter()

    def on_run_start(self, trainer: Any) -> None:
        self._began = time.perf_counter()

    def on_progress(self, trainer: Any) -> None:
        if trainer.progress == trainer.total:
            seconds = time.perf_counter() - self._began
            record = {"event": "waiting", "step": trainer.progress, "seconds": seconds, "waiting": trainer.waiting}
            self.events.write(record)


class _Check(Callback):
    """Stops, before anything is written, where another process has taken the work over."""

    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt

    def on_event(self, trainer: Any, record: dict[str, Any]) -> None:
        self.attempt.check()


def run_training(
    make: Callable[[Sequence[Callback]], T],
    title: str,
    *,
    events: StageEvents,
    attempt: Attempt,
    workspace: Workspace,
    checkpoint_every: int,
    callbacks: Sequence[Callback] = (),
) -> tuple[T, float]:
    """Make a trainer and let it run, from the attempt's newest checkpoint where there is one.

    Args:
        make: gives the trainer with these callbacks.
        title: of the progress bar.
        checkpoint_every: units between two checkpoints; there is always one before the first unit, so that a training
            that was interrupted early goes on from the same random state.
        callbacks: the stage's own; they are called before a checkpoint is made.

    Returns:
        The trainer, and its wall-clock seconds, those before an interruption included.

    Raises:
        NonFiniteError: a step that is not finite beyond those that may be left out; it names the stage.
        Interrupted: a signal asked for it; a checkpoint of the last step has been made.
    """
    seconds = Seconds()
    trainer = make(
        [
            _Check(attempt),
            _Waiting(events),
            events,
            seconds,
            ProgressBar(workspace.console, title),
            *(() if workspace.watch is None else (workspace.watch(title),)),
            *callbacks,
            Inspect(workspace.inspect, prefix=f"{events.name}-"),
            Checkpointing(attempt.directory, every=checkpoint_every),
        ]
    )
    if trainer.resume(attempt.directory):
        steps = " and ".join(f"{count} {level}" for level, count in trainer.steps.items())
        workspace.console.print(f"{title}: continues after {steps} steps", markup=False, highlight=False)
    try:
        trainer.run()
    except NonFiniteError as error:
        raise NonFiniteError(f"{events.context['stage']} {error}") from error
    return trainer, seconds.total()
