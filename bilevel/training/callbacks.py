"""What listens to a training run: metrics, progress, checkpoints."""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
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
from rich.table import Table

from bilevel.checkpoint import newest_number, save_checkpoint
from bilevel.checks import check_count, check_kind, check_path
from bilevel.distributed import on_first_rank, rank
from bilevel.hypergradients import Hypergradient
from bilevel.linear import Status

_SHORTEST_BAR, _LONGEST_BAR = 10, 40
"""Columns of a terminal."""

Record = dict[str, Any]
"""One event: ``event`` ("lower", "adaptation", "upper", "alternation"; "train" of one level alone), ``step``, and its
numbers. Events of one name have the same fields whatever the method."""


def upper_record(result: Hypergradient | None) -> Record:
    """The numbers of an upper event that say how far its hypergradient can be trusted; None for what there is not."""
    solution = None if result is None else result.solution
    ritz_min, ritz_max = (solution.ritz_range if solution is not None else None) or (None, None)
    of_solve = {
        "status": solution and solution.status.name,
        "residual": solution and solution.residual_norms[1],
        "residual_curve": solution and list(solution.residual_curve),
        "relative_change": solution and solution.relative_change,
        "cosine": solution and solution.cosine,
        "min_curvature": solution and solution.min_curvature,
        "ritz_min": ritz_min,
        "ritz_max": ritz_max,
        "tikhonov": solution and solution.tikhonov,
        "residual_without_tikhonov": solution and solution.residual_without_tikhonov,
        "solver_noise": solution and solution.noise,
        "iterations": solution and solution.iterations,
        "num_hvps": solution and solution.num_hvps,
    }
    return {
        **of_solve,
        "failure": result and result.failure,
        "stationarity": result and result.stationarity,
        "gradient_noise": result and result.noise,
        "stationarity_over_noise": result and result.stationarity_over_noise,
        "active_changes": result and result.active_changes,
    }


class Callback:
    """Receives a trainer's events; the methods do nothing by default.

    `trainer` is the training that calls: a `Trainer`, whose units are alternations, or a `SingleLevelTrainer`, whose
    units are steps. `trainer.progress` of `trainer.total` units are made.
    """

    def on_new_run(self, trainer: Any) -> None:
        """When `Training.resume` finds nothing to continue: drop what an earlier attempt has left."""

    def on_run_start(self, trainer: Any) -> None:
        """Before the first unit of this process."""

    def on_event(self, trainer: Any, record: Record) -> None:
        """After each step and adaptation, and at the end of each alternation."""

    def on_progress(self, trainer: Any) -> None:
        """When a unit is whole, a point to save the trainer's state at."""

    def on_nonfinite(self, trainer: Any, level: str, record: Record) -> str | None:
        """When a loss or gradient is not finite, before the step is given up; what to add to the message, if anything.

        `level` is the name of the step's level, `record` its event, and every variable is as it was before the step.
        """
        return None

    def on_interrupt(self, trainer: Any) -> None:
        """When a signal stops the run early, between two steps (`bilevel.interruption`)."""

    def on_run_end(self, trainer: Any) -> None:
        """After the last unit, and after an exception or an interrupt."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold for this callback."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""


class JSONLWriter(Callback):
    """Appends one JSON object per event to a file; numbers that are not finite become null, in lists too.

    The checkpoint holds the file's length, and resuming cuts the file back to it, so that no event is there twice. Of
    several ranks the first writes.

    Args:
        path: the file; its folder is made where it is missing.
        context: fields that every line carries, for example {"stage": "bissl", "seed": 0}.
    """

    def __init__(self, path: str | Path, context: Mapping[str, Any] | None = None) -> None:
        check_path("JSONLWriter: path", path)
        check_kind("JSONLWriter: context", context, (Mapping, NoneType), "a mapping of fields to values, or None")
        self.path, self.context = Path(path), dict(context or {})

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line."""
        if rank() > 0:
            return
        line = json.dumps({**self.context, **{key: _finite(value) for key, value in record.items()}}, allow_nan=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def on_event(self, trainer: Any, record: Record) -> None:
        self.write(record)

    def state_dict(self) -> dict[str, Any]:
        return {"length": self.path.stat().st_size if self.path.exists() else 0}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if rank() == 0 and self.path.exists() and self.path.stat().st_size > state["length"]:
            os.truncate(self.path, state["length"])


class ProgressBar(Callback):
    """A bar over the training's units with the losses, the state of the last solve, how many steps were left out, and
    the share of the time in which the training waited for data where that is 1% or more; on the first rank.

    A narrow terminal's columns go to what is the most useful, and what does not fit beside it is left out: the time to
    go, the steps left out, the losses, the solve, the bar (at least 10 columns), the time since the start, the waiting.
    """

    def __init__(self, console: Console | None = None, description: str = "bilevel") -> None:
        _check_console("ProgressBar: console", console)
        self.console, self.description = console, description
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._latest: dict[str, str] = {}
        self._name, self._whole = TextColumn("{task.description}"), MofNCompleteColumn()
        self._drawn, self._elapsed, self._left = BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        self._status = TextColumn("{task.fields[status]}")

    def on_run_start(self, trainer: Any) -> None:
        self._bar = Progress(console=self.console, disable=rank() > 0)
        self._task = self._bar.add_task(self.description, total=trainer.total, completed=trainer.progress, status="")
        self._fit(self._bar)
        self._bar.start()

    def on_event(self, trainer: Any, record: Record) -> None:
        if "loss" in record:
            name = "loss" if record["event"] == "train" else record["event"]
            self._latest[name] = f"{name} {record['loss']:.4f}"
        if record.get("status") is not None:
            residual = "" if math.isnan(record["residual"]) else f", residual {record['residual']:.1e}"
            self._latest["solve"] = f"{record['status'].lower()}{residual}"

    def on_progress(self, trainer: Any) -> None:
        share = trainer.waiting
        self._latest["waiting"] = f"waiting for data {share:.0%}" if share >= 0.01 else ""
        if trainer.skipped.total():
            self._latest["skipped"] = f"{trainer.skipped.total()} skipped"
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.progress)
            self._fit(self._bar)

    def _fit(self, bar: Progress) -> None:
        """Show as much as the terminal's width takes, the most useful first."""
        task, words = bar.tasks[0], {name: text for name, text in self._latest.items() if text}
        losses = [name for name in words if name not in ("skipped", "solve", "waiting")]
        columns = {"left": self._left, "elapsed": self._elapsed}
        # A space between columns, two between words.
        room = bar.console.width - sum(column.render(task).cell_len + 1 for column in (self._name, self._whole))
        shown: set[str] = set()
        for name in ("left", "skipped", *losses, "solve", "bar", "elapsed", "waiting"):
            if name == "bar":
                size = _SHORTEST_BAR
            elif name in columns:
                size = columns[name].render(task).cell_len
            else:
                size = len(words[name]) + 1 if name in words else 0
            if 0 < size < room:
                room -= size + 1
                shown.add(name)
        self._drawn.bar_width = min(_LONGEST_BAR, _SHORTEST_BAR + room)
        bar.columns = (
            self._name,
            *([self._drawn] if "bar" in shown else []),
            self._whole,
            *([self._elapsed] if "elapsed" in shown else []),
            *([self._left] if "left" in shown else []),
            self._status,
        )
        bar.update(self._task, status="  ".join(text for name, text in words.items() if name in shown))

    def on_run_end(self, trainer: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Checkpointing(Callback):
    """Saves the training's state every so many units (alternations, or steps of one level), after the last, and when a
    signal stops the run. ``trainer.resume(directory)`` continues from the newest one.

    Put it last in the list of callbacks. The checkpoint's number is that of the last whole unit.

    Args:
        directory: where `save_checkpoint` writes and `load_checkpoint` looks.
        every: units between two checkpoints.
        keep: how many of the newest stay.

    Raises:
        ValueError: when the run begins, and nothing was trained: there are checkpoints in the directory already, and
            the training continues none. They would be deleted one by one, or taken up later in place of its own.
    """

    def __init__(self, directory: str | Path, *, every: int = 1, keep: int = 2) -> None:
        check_path("Checkpointing: directory", directory)
        check_count("Checkpointing: every", every, least=1)
        check_count("Checkpointing: keep", keep, least=1)
        self.directory, self.every, self.keep = Path(directory), every, keep
        self._has_saved = False

    def on_run_start(self, trainer: Any) -> None:
        if trainer.progress == 0 and not (trainer.continues or self._has_saved):
            number = on_first_rank(lambda: newest_number(self.directory))
            if number is not None:
                raise ValueError(
                    f"Checkpointing: {self.directory} holds checkpoints of another run, the newest of number {number}, "
                    "and this training does not continue it: call trainer.resume(directory) before run() to do so, or "
                    "give a directory of its own"
                )

    def on_progress(self, trainer: Any) -> None:
        if trainer.progress % self.every == 0 or trainer.progress == trainer.total:
            self.on_interrupt(trainer)

    def on_interrupt(self, trainer: Any) -> None:
        save_checkpoint(self.directory, trainer.progress, trainer.state_dict(), keep=self.keep)
        self._has_saved = True


# Of the columns that need another width than their titles'.
_WIDTHS = {"Ritz values": 20, "status": 0}


class Diagnostics(Callback):
    """Prints what is known about the linear solves: a line every so many alternations, and a summary at the end.

    A line covers the upper steps since the line before: how many solves ended with which `Status`; the largest relative
    residual; iterations and operator products, summed; the smallest curvature and the extreme Ritz values met; the mean
    of ``||x - v|| / ||v||`` and of cos(x, v), near 0 and 1 where solving changed little; and, of the last step, the
    stationarity of the lower level and its multiple of the noise of the mini-batches
    (`Hypergradient.stationarity_over_noise`). "-" stands for what was not measured. Where `Escalating` added Tikhonov
    terms, the status ends with the largest of them and the largest residual without it. The summary counts the run's
    solves by status, and says what each status means and asks to do.

    Args:
        console: where to print; share it with a `ProgressBar`, and place this callback after the bar.
        every: alternations a line; None prints the summary alone.

    Raises:
        TypeError: another console than rich's.
        ValueError: an `every` below 1 or that is no whole number.
    """

    def __init__(self, console: Console | None = None, every: int | None = 1) -> None:
        _check_console("Diagnostics: console", console)
        if every is not None:
            check_count("Diagnostics: every", every, least=1, otherwise="None for no lines")
        self.console, self.every = console or Console(quiet=rank() > 0), every
        self._since: list[Record] = []
        self._headed = False

    def on_run_start(self, trainer: Any) -> None:
        self._headed = False

    def on_event(self, trainer: Any, record: Record) -> None:
        if self.every is None:
            return
        if record["event"] == "upper" and record["status"] is not None:
            self._since.append(record)
        if record["event"] == "alternation" and self._since:
            number = record["alternation"]
            if number % self.every == 0 or number == trainer.total:
                self._print_line(diagnostics_cells(number, self._since))
                self._since = []

    def on_run_end(self, trainer: Any) -> None:
        if trainer.solves:
            self.console.print(solves_table(trainer.solves))

    def _print_line(self, cells: Mapping[str, str]) -> None:
        """As plain text: a `Table` would be cut to the width of the terminal."""
        widths = [_WIDTHS.get(title, max(len(title), 8)) for title in cells]
        for row in [cells.values()] if self._headed else [cells.keys(), cells.values()]:
            text = "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._headed = True

    def state_dict(self) -> dict[str, Any]:
        return {"since": list(self._since)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._since = list(state["since"])


def diagnostics_cells(alternation: int, solves: Sequence[Record]) -> dict[str, str]:
    """Column -> cell of one line over "upper" events, as `Diagnostics` describes it."""

    def met(name: str) -> list[float]:
        return [record[name] for record in solves if record[name] is not None and not math.isnan(record[name])]

    def mean(name: str) -> float | None:
        return sum(met(name)) / len(met(name)) if met(name) else None

    ritz = f"{_short(min(met('ritz_min')))} .. {_short(max(met('ritz_max')))}" if met("ritz_min") else "-"
    statuses = [f"{count} {status}" for status, count in Counter(record["status"] for record in solves).items()]
    if any(met("tikhonov")):
        without = _short(max(met("residual_without_tikhonov"), default=None))
        statuses.append(f"tikhonov {_short(max(met('tikhonov')))} (residual without it {without})")
    return {
        "alternation": str(alternation),
        "residual": _short(max(met("residual"), default=None)),
        "iterations": str(sum(met("iterations"))),
        "products": f"{sum(met('num_hvps')):g}",
        "curvature": _short(min(met("min_curvature"), default=None)),
        "Ritz values": ritz,
        "|x-v|/|v|": _short(mean("relative_change")),
        "cos(x, v)": _short(mean("cosine")),
        "stationarity": _short(solves[-1]["stationarity"]),
        "x noise": _short(solves[-1]["stationarity_over_noise"]),
        "status": ", ".join(statuses),
    }


def solves_table(solves: Mapping[str, int]) -> Table:
    """Counts of solves by the name of their `Status`, successes first, each with what the status says."""
    failed = sum(count for name, count in solves.items() if not Status[name].ok)
    table = Table(title=f"{sum(solves.values())} linear solves, {failed or 'none'} of them failed")
    table.add_column("status", no_wrap=True)
    table.add_column("solves", justify="right")
    table.add_column("what it means and asks for")
    for name in (status.name for status in Status if solves.get(status.name)):
        table.add_row(name, str(solves[name]), Status[name].value)
    return table


def _check_console(argument: str, console: object) -> None:
    check_kind(argument, console, (Console, NoneType), "a rich.console.Console, or None")


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _finite(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
