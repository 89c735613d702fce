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


class Bars:
    """While entered, shows what the workers say."""

    def __init__(self, console: Console) -> None:
        # Away at the end, when each has become a line.
        self._progress = Progress(
            TextColumn("{task.description}"),
            *(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
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

    def ended(self, worker: int) -> None:
        """Take the worker's bar away, if it has one."""
        if worker in self._tasks:
            self._progress.remove_task(self._tasks.pop(worker)[1])
