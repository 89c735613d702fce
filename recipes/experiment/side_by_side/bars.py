"""What the terminal shows of several workers: a line for each training that is finished, a bar for each under way."""

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
from rich.text import Text

from .reporter import Reached

_SHORTEST_BAR, _LONGEST_BAR, _TIME = 10, 40, 8
"""Columns of a terminal."""


class Bars:
    """While entered, shows what the workers say.

    In a narrow terminal the time since the start is left out first, then the bar, then the time to go; in a narrower
    one titles and counts are cut.
    """

    def __init__(self, console: Console) -> None:
        self._name, self._whole, self._drawn = TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn()
        self._elapsed, self._left = TimeElapsedColumn(), TimeRemainingColumn()
        # Away at the end, when each has become a line.
        self._progress = Progress(console=console, transient=True, disable=not console.is_terminal)
        self._console = console
        self._tasks: dict[int, tuple[str, TaskID]] = {}

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._progress.stop()

    def said(self, text: str) -> None:
        """Print a worker's text above the bars."""
        if lines := text.strip("\n"):
            self._console.print(Text.from_ansi(lines), soft_wrap=True)

    def reached(self, worker: int, news: Reached) -> None:
        """Move the bar of worker number `worker`, which begins, goes on with or ends a training."""
        title, task = self._tasks.get(worker, (None, None))
        if title != news.title or news.completed == news.total:
            self.ended(worker)
            task = None
        if news.completed == news.total:
            return
        if task is None:
            task = self._progress.add_task(news.title, total=news.total)
            self._tasks[worker] = news.title, task
        self._progress.update(task, completed=news.completed)
        self._fit()

    def ended(self, worker: int) -> None:
        """Take the worker's bar away, if it has one."""
        if worker in self._tasks:
            self._progress.remove_task(self._tasks.pop(worker)[1])

    def _fit(self) -> None:
        """Show as much as the terminal's width takes; a space stands between columns."""
        room = self._progress.console.width
        for column in (self._name, self._whole):
            room -= max(column.render(task).cell_len for task in self._progress.tasks) + 1
        shown = []
        for column, size in ((self._left, _TIME), (self._drawn, _SHORTEST_BAR), (self._elapsed, _TIME)):
            if size >= room:
                break
            room -= size + 1
            shown.append(column)
        self._drawn.bar_width = min(_LONGEST_BAR, _SHORTEST_BAR + room)
        order = (self._name, self._drawn, self._whole, self._elapsed, self._left)
        self._progress.columns = tuple(c for c in order if c in shown or c in (self._name, self._whole))
