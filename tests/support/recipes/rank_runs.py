"""Small runs of the recipe by several processes, as torchrun starts them."""

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from benchmarks.measuring import free_port
from benchmarks.soak import join_all
from bilevel.interruption import SIGNALS
from recipes.bissl.commands.main import main
from tests.support.rank_processes import forkserver
from tests.support.recipes.small_runs import SMALL_OPTIONS, leave_out_report

TIMEOUT = 100.0
"""Seconds in which every such run must have ended."""


@dataclass
class RankRun:
    """Processes under way."""

    processes: Sequence[BaseProcess]
    logs: Sequence[Path]

    def end(self, timeout: float = TIMEOUT) -> list[int | None]:
        """Exit codes, by rank; those that do not end are killed, and have None."""
        codes = join_all(self.processes, timeout)
        for process in self.processes:
            process.kill()
            process.join()
        return codes

    def said(self) -> list[list[str]]:
        """What each rank wrote to standard error about the run, line by line."""
        return [
            [line for line in log.read_text().splitlines() if line.startswith("run.py: ") or "Traceback" in line]
            for log in self.logs
        ]

    def wait_for(self, met: Callable[[], bool]) -> None:
        """Until `met`; the test fails where a process ends before."""
        until = time.monotonic() + TIMEOUT
        while not met():
            assert all(process.is_alive() for process in self.processes), self.said()
            assert time.monotonic() < until, self.said()
            time.sleep(0.01)


def start(
    ranks: int,
    folder: Path,
    *arguments: str,
    own: Sequence[Sequence[str]] | None = None,
    changes: Mapping[str, object] | None = None,
    report: bool = False,
) -> RankRun:
    """Start `ranks` processes with the arguments of a small run, whose words go to files in `folder`.

    Args:
        own: further arguments of each rank.
        changes: of the environment that all are given.
        report: whether it is drawn, which takes longer than a short run.
    """
    context = forkserver()
    folder.mkdir(parents=True, exist_ok=True)
    logs, processes, port = [folder / f"rank{rank}.log" for rank in range(ranks)], [], free_port()
    for rank, log in enumerate(logs):
        named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in {**named, **(changes or {})}.items()}
        options = [*SMALL_OPTIONS, *arguments, *(own[rank] if own else ())]
        processes.append(context.Process(target=_rank, args=(options, environment, str(log), report)))
    for process in processes:
        process.start()
    return RankRun(processes, logs)


def run_ranks(ranks: int, folder: Path, *arguments: str, report: bool = False) -> RankRun:
    """As `start`, to its end."""
    run = start(ranks, folder, *arguments, report=report)
    run.end()
    return run


def _rank(arguments: list[str], environment: Mapping[str, str], log: str, report: bool) -> None:
    os.environ.update(environment)
    with (
        open(log, "w", encoding="utf-8") as words,
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        pytest.MonkeyPatch.context() as patch,
    ):
        if not report:
            leave_out_report(patch)
        # What C++ writes too.
        os.dup2(words.fileno(), 2)
        sys.stderr, sys.stdout = words, nowhere
        # As the command does: what comes after `main` could only change the exit code.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = int(str(stop.code))
    sys.stderr, sys.stdout = sys.__stderr__, sys.__stdout__
    sys.exit(code)
