"""The loop that plain stages share: steps with metrics, checkpoints and exact resume."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from bilevel import interruption
from bilevel.checkpoint import load_checkpoint, random_state, save_checkpoint, set_random_state
from bilevel.distributed import mean_with_gradient, rank, world_size
from bilevel.interruption import Interrupted
from bilevel.training import Callback, NonFiniteError
from bilevel.tree import Params

from ...experiment.events import StageEvents
from ...experiment.folder.folder_lease import leased
from .nonfinite import NonFiniteSteps, Stateful

MOST_LINES = 2000
"""Upper bound on the "train" events that one stage writes."""


class Seconds(Callback):
    """Wall-clock seconds of a stage, over all the processes that worked on it."""

    def __init__(self) -> None:
        self._before, self._began = 0.0, time.perf_counter()

    def total(self) -> float:
        """Seconds so far."""
        return self._before + time.perf_counter() - self._began

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.total()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._before, self._began = state["seconds"], time.perf_counter()


def run_steps(
    step: Callable[[], dict[str, Any]],
    *,
    total: int,
    parts: Mapping[str, Stateful],
    writer: StageEvents,
    directory: Path,
    checkpoint_every: int,
    console: Console,
    description: str,
    after: Callable[[int], None] | None = None,
    nonfinite_skips: int = 0,
) -> float:
    """Make steps 1 to `total`, or those that are left according to the checkpoints in `directory`.

    Args:
        step: one step; returns its "train" event.
        parts: everything that changes and that a continuation needs.
        checkpoint_every: steps between two checkpoints; there is always one before the first step, so that a stage
            that was interrupted early goes on from the same random state.
        after: called with the number of each finished step, before a checkpoint is made.
        nonfinite_skips: as for `NonFiniteSteps`.

    Returns:
        Wall-clock seconds, those before an interruption included.

    Raises:
        NonFiniteError: a step that is not finite beyond those that may be skipped.
        Interrupted: a signal asked for it; a checkpoint of the last step has been made.
        ConfigError: another process trains in `directory`.
    """
    seconds, steps = Seconds(), NonFiniteSteps(nonfinite_skips, parts, writer)
    everything: dict[str, Stateful] = {**parts, "nonfinite": steps, "metrics": writer, "seconds": seconds}
    every = math.ceil(total / MOST_LINES)
    with interruption.deferred(), leased(directory, "artifacts") as check, closing(writer), _progress(console) as bar:
        first = saved = _start(directory, everything, writer)
        if first:
            console.print(f"{description}: continues after step {first}", markup=False, highlight=False)
        task = bar.add_task(description, total=total, completed=first, status="")
        for number in range(first + 1, total + 1):
            check()
            try:
                interruption.check()
            except Interrupted:
                if saved < number - 1:
                    _save(directory, number - 1, everything)
                raise
            record = steps.make(step, number)
            if number % every == 0 or number == total or "skipped" in record:
                writer.write({"event": "train", "step": number, **record})
            if after is not None:
                after(number)
            bar.update(task, completed=number, status=f"loss {record['loss']:.4f}")
            if number % checkpoint_every == 0 and number < total:
                _save(directory, number, everything)
                saved = number
    return seconds.total()


def _start(directory: Path, everything: Mapping[str, Stateful], writer: StageEvents) -> int:
    """Continue from the newest checkpoint, or make the one before the first step; the step it is of."""
    found = load_checkpoint(directory)
    if found is None:
        writer.restart()
        _save(directory, 0, everything)
        return 0
    first, state = found
    for name, part in everything.items():
        part.load_state_dict(state[name])
    set_random_state(state["random"])
    return first


def discard_checkpoints(directory: Path) -> None:
    """Delete the checkpoints of a stage whose artifact is finished."""
    if rank() > 0:
        return
    for path in directory.glob("step-*"):
        path.unlink(missing_ok=True)


def optimizer_step(
    loss: Tensor, optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler
) -> dict[str, Any]:
    """Backward and one update by the ranks' mean, unless the loss or a gradient is not finite; the step's event.

    Raises:
        NonFiniteError: before anything has changed.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if world_size() == 1:
        return _apply(loss.detach(), optimizer, scheduler)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    variables: Params = {str(index): p for index, p in enumerate(parameters)}
    gradient = {name: p.grad for name, p in variables.items() if p.grad is not None}
    return gradient_step(loss.detach(), gradient, variables, optimizer, scheduler)


def gradient_step(
    loss: Tensor,
    gradient: Params,
    variables: Params,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> dict[str, Any]:
    """As `optimizer_step`, from a rank's gradient over the optimizer's parameters `variables` that is there already.

    Raises:
        NonFiniteError: before anything has changed.
    """
    loss, gradient = mean_with_gradient(loss, gradient)
    optimizer.zero_grad(set_to_none=True)
    for name, variable in variables.items():
        variable.grad = gradient[name]
    return _apply(loss, optimizer, scheduler)


def _apply(
    loss: Tensor, optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler
) -> dict[str, Any]:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    # One read of the device a step: it waits for all that was queued.
    value, norm = torch.stack((loss, nn.utils.get_total_norm(gradients))).tolist()
    rate = float(optimizer.param_groups[0]["lr"])
    if not (abs(value) < float("inf") and norm < float("inf")):
        raise NonFiniteError(
            f"loss {value}, gradient norm {norm}; no weight was changed. Lower the learning rate ({rate:g}), or check "
            "the data"
        )
    optimizer.step()
    scheduler.step()
    return {"loss": value, "lr": rate, "grad_norm": norm}


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        *(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()),
        TextColumn("{task.fields[status]}"),
        console=console,
    )


def _save(directory: Path, number: int, parts: Mapping[str, Stateful]) -> None:
    state = {name: part.state_dict() for name, part in parts.items()}
    save_checkpoint(directory, number, {**state, "random": random_state()})
