"""Several worker processes of one search on this machine."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TypeVar

from bilevel import interruption

T = TypeVar("T")


def run_workers(work: Callable[[T], None], argument: T, count: int) -> list[int]:
    """Run ``work(argument)`` in `count` processes; exit codes of those that ended with another than 0.

    None of them outlives this process, however it ends.

    Args:
        work: a function of a module, and `argument`: both travel to other processes.

    Raises:
        Interrupted: this process was asked to stop, and so were the workers, which have ended.
    """
    # Not forked from this process, whose CUDA and threads would not survive it, but from one that only has imported.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([work.__module__])
    # Only this process holds the other end, which closes with it.
    theirs, ours = server.Pipe(duplex=False)
    with theirs, ours:
        # No daemons, which may not start processes of their own.
        processes = [server.Process(target=_serve, args=(work, argument, theirs)) for _ in range(count)]
        for process in processes:
            process.start()
        try:
            with interruption.deferred():
                for process in processes:
                    while process.exitcode is None:
                        process.join(1.0)
                        _pass_on_signals(processes)
                interruption.check()
        finally:
            for process in processes:
                process.terminate()
    return [process.exitcode for process in processes if process.exitcode]


def _serve(work: Callable[[T], None], argument: T, parent: Connection) -> None:
    """Work, until the process at the other end is gone."""
    threading.Thread(target=_end_with, args=(parent,), name="parent", daemon=True).start()
    work(argument)


def _end_with(parent: Connection) -> None:
    # Nothing is ever sent: what can be read is the end.
    parent.poll(None)
    # What is left is what a killed worker leaves: another takes its trial up from the last checkpoint.
    os._exit(1)


def _pass_on_signals(processes: Sequence[BaseProcess]) -> None:
    """What asks this process to stop asks its workers."""
    handler = interruption.installed()
    if handler is not None and handler.asked_by is not None:
        for process in processes:
            process.terminate()
