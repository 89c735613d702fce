"""A worker process: it does the jobs that the run's process sends, one after the other, and ends with it."""

import copy
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from bilevel.interruption import SIGNALS, Interrupted, Interruption

from .reporter import Look, Reporter

Open = Callable[[Any, Reporter], Callable[[Any], None]]
"""Given what all workers are given, makes ready and returns what does a job; a function of a module."""


@dataclass(frozen=True)
class Done:
    """The job is done."""


@dataclass(frozen=True)
class Failed:
    """The job, or making ready for it, raised.

    Attributes:
        error: of a kind that the run's process answers itself; None where it is another.
        message: what it was in one line.
    """

    error: Exception | None
    message: str


@dataclass(frozen=True)
class Stopped:
    """A signal asked this worker to stop, which it did where its work was saved."""

    asked_by: signal.Signals


@dataclass(frozen=True)
class Order:
    """What a worker is started with.

    Attributes:
        open, given: what does the jobs, and what it is given.
        expected: errors that travel to the run's process as they are.
        look: of its terminal.
        log: file of everything that is written to standard output and standard error here.
    """

    open: Open
    given: Any
    expected: tuple[type[Exception], ...]
    look: Look
    log: str


def serve(order: Order, connection: Connection) -> None:
    """Do what comes until None does, or until the process at the other end is gone, however it ended."""
    log = os.open(order.log, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    jobs: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_listen, args=(connection, jobs), name="jobs", daemon=True).start()
    try:
        with Interruption():
            # Held back since the start, where nobody would have answered them.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            do = order.open(order.given, Reporter(connection, order.look))
            while (job := jobs.get()) is not None:
                do(job)
                connection.send(Done())
    except Interrupted as stop:
        connection.send(Stopped(stop.signal))
    except KeyboardInterrupt:
        connection.send(Stopped(signal.Signals.SIGINT))
    except Exception as error:
        expected = isinstance(error, order.expected) and _travels(error)
        if not expected:
            traceback.print_exc()
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        connection.send(Failed(error, "") if expected else Failed(None, message))


def _listen(connection: Connection, jobs: "SimpleQueue[Any]") -> None:
    try:
        while True:
            jobs.put(connection.recv())
    except (EOFError, OSError):
        # The run was killed: what it left is what a run in one process leaves, and another may go on at once.
        os._exit(1)
    except Exception:
        traceback.print_exc()
        os._exit(1)


def _travels(error: Exception) -> bool:
    """Whether an error is the same at the other end of a pipe; some kinds cannot be made again from their arguments."""
    try:
        pickle.dumps(error)
        # Made again as at the other end.
        return type(copy.copy(error)) is type(error)
    except Exception:
        return False
