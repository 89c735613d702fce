"""Worker processes that read pictures, one set of them for a whole run."""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from bilevel.interruption import SIGNALS

from ...experiment.side_by_side.apart import processes_apart
from .work import Made, Work

PRELOADED = ["torch", "torchvision.io", "PIL.Image", __name__.rpartition(".")[0] + ".work"]
MOST_WORKERS = 16
BUDGET = 2**29
"""Bytes of crops that may be under way or waiting on one machine."""
SHARED_MEMORY = Path("/dev/shm")
LOST = (
    "a worker process that reads images has ended unexpectedly, as one does that the system kills for want of memory; "
    "lower data.num_workers, or give the run more memory"
)

FULL = (
    "a worker process that reads images has no memory left; lower data.num_workers, give the run more memory, or make "
    "the pictures smaller"
)


class WorkerLost(RuntimeError):
    """A worker process has ended without having been asked to, or cannot go on for want of memory."""


class Pending(Protocol):
    """Work that is being made, or will be."""

    def result(self) -> Made:
        """What it made, which may be waited for.

        Raises:
            DataError: a picture cannot be read.
            WorkerLost: the process that made it is gone.
        """
        ...

    def done(self) -> bool:
        """Whether `result` waits for nobody else."""
        ...

    def cancel(self) -> Any:
        """Nobody will ask for it: what is not begun yet is left undone."""
        ...


@dataclass(frozen=True)
class Later:
    """Work that this process makes once its result is wanted."""

    work: Work

    def result(self) -> Made:
        return self.work.run()

    def done(self) -> bool:
        return True

    def cancel(self) -> None:
        return None


@dataclass(frozen=True)
class Elsewhere:
    """Work that a worker process makes."""

    future: Future[Any]

    def result(self) -> Made:
        try:
            made = self.future.result()
        except BrokenProcessPool as error:
            raise WorkerLost(LOST) from error
        except (MemoryError, RuntimeError) as error:
            # torch's allocator raises RuntimeError.
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            raise WorkerLost(FULL) from error
        return _as_tensors(made)

    def done(self) -> bool:
        return self.future.done()

    def cancel(self) -> bool:
        return self.future.cancel()


class _Process(ForkServerProcess):
    """A worker. Where one is lost the executor terminates the others and waits for them; SIGTERM they do not hear."""

    def terminate(self) -> None:
        self.kill()


class _Context(ForkServerContext):
    Process = _Process  # type: ignore[assignment]


class Workers:
    """`count` worker processes, started when they are first needed; none with a count of 0.

    They are forked from a server process that has nothing but torch and this room in memory (never from this one,
    whose threads and CUDA contexts do not survive a fork), leave signals to the run, and end with it.

    Args:
        count: processes.
        budget: bytes of crops that may be under way or waiting, over all streams.
    """

    def __init__(self, count: int, budget: int = BUDGET) -> None:
        self.count, self.budget = count, budget
        self.in_flight = 0
        self._pool: ProcessPoolExecutor | None = None
        self._by_pipe = False

    def submit(self, work: Work) -> Pending:
        """Have it made, by a worker or, without any, by this process when the result is wanted."""
        if self.count == 0:
            return Later(work)
        try:
            with processes_apart():
                return Elsewhere(self._executor().submit(_run, work, self._by_pipe))
        except (BrokenProcessPool, EOFError, ConnectionError) as error:
            raise WorkerLost(LOST) from error

    def room(self, nbytes: int) -> bool:
        """Whether so many bytes more may be made ahead of their use."""
        return self.in_flight + nbytes <= self.budget

    def close(self) -> None:
        """End the processes; what they have not begun is given up."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _executor(self) -> ProcessPoolExecutor:
        if self._pool is None:
            free = shared_memory()
            self._by_pipe = free is not None and free < 2 * self.budget
            context = _Context()
            context.set_forkserver_preload(PRELOADED)
            self._pool = ProcessPoolExecutor(self.count, context, _begin, (os.getpid(),))
            # Also at the interpreter's end, which an executor that is forgotten until then does not survive silently.
            weakref.finalize(self, self._pool.shutdown, cancel_futures=True)
        return self._pool

    def describe(self) -> str | None:
        """A sentence on how crops come here where that is not the usual way."""
        free = shared_memory()
        if self.count == 0 or free is None or free >= 2 * self.budget:
            return None
        return (
            f"{SHARED_MEMORY} has {free // 2**20} MiB, too little for {2 * self.budget // 2**20} MiB of images: "
            "workers send them through pipes, which costs a copy; docker run takes --shm-size"
        )


def shared_memory() -> int | None:
    """Bytes that are free for tensors shared between processes; None where the system does not say."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def available_cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_to_spare(processes: int | None = None) -> int:
    """Workers that leave the run its core, of each of so many processes on this machine; by default torchrun's."""
    return min(MOST_WORKERS, max(1, available_cores() // _on_this_machine(processes) - 1))


def share_of_budget(processes: int | None = None) -> int:
    """Bytes for each of so many processes on this machine, which share its memory; by default torchrun's."""
    return BUDGET // _on_this_machine(processes)


def _on_this_machine(processes: int | None) -> int:
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if processes is None else processes)


def _begin(parent: int) -> None:
    """In a new worker: one thread for tensors, no signals, and an end when the run's process is gone."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    torch.set_num_threads(1)
    server = os.getppid()

    def watch() -> None:
        # A server whose run is gone ends, and leaves its workers to another parent.
        while os.getppid() == server and _alive(parent):
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def _run(work: Work, by_pipe: bool) -> Made:
    made = work.run()
    return _as_arrays(made) if by_pipe or not _shared(made) else made


def _shared(made: Made) -> bool:
    """Move what was made to shared memory, if there is room left; another program may have taken it."""
    try:
        for tensor in (*made.crops, *made.masks):
            tensor.share_memory_()
    except RuntimeError:
        return False
    return True


def _as_arrays(made: Made) -> Made:
    """Arrays are sent through a pipe, tensors through shared memory."""
    crops, masks = ([part.numpy() for part in parts] for parts in (made.crops, made.masks))
    return replace(made, crops=tuple(crops), masks=tuple(masks))  # type: ignore[arg-type]


def _as_tensors(made: Made) -> Made:
    def tensor(part: Any) -> torch.Tensor:
        return torch.from_numpy(part) if isinstance(part, np.ndarray) else part

    return replace(made, crops=tuple(map(tensor, made.crops)), masks=tuple(map(tensor, made.masks)))
