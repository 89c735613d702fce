"""Several worker processes of one search on this machine."""

import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import TypeVar

from bilevel import interruption

T = TypeVar("T")


def run_workers(work: Callable[[T], None], argument: T, count: int) -> list[int]:
    """Run ``work(argument)`` in `count` processes; exit codes of those that ended with another than 0.

    Args:
        work: a function of a module, and `argument`: both travel to other processes.

    Raises:
        Interrupted: this process was asked to stop, and so were the workers, which have ended.
    """
    # Not forked from this process, whose CUDA and threads would not survive it, but from one that only has imported.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([work.__module__])
    # No daemons, which may not start processes of their own.
    processes = [server.Process(target=work, args=(argument,)) for _ in range(count)]
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


def _pass_on_signals(processes: Sequence[BaseProcess]) -> None:
    """What asks this process to stop asks its workers."""
    handler = interruption.installed()
    if handler is not None and handler.asked_by is not None:
        for process in processes:
            process.terminate()
