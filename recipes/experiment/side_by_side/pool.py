"""The run's process: it hands jobs to workers, each after those that it needs, and sees all workers end."""

import multiprocessing
import signal
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.console import Console

from bilevel import interruption
from bilevel.interruption import Interrupted

from .apart import processes_apart
from .bars import Bars
from .reporter import Look, Reached, Said
from .worker import Done, Failed, Open, Order, Stopped, serve

POLL = 0.2
"""Longest time in which a signal to this process is not passed on (s)."""


class JobFailed(RuntimeError):
    """A worker met an error that is a fault of the program or of what was plugged in; its log has the traceback."""


class JobLost(RuntimeError):
    """A worker process has ended without having been asked to."""


@dataclass(frozen=True)
class Job:
    """A piece of work.

    Attributes:
        name: in messages.
        task: what the workers are sent.
        after: places, in the list of all jobs, of those that must be done before; they come earlier there.
    """

    name: str
    task: Any
    after: tuple[int, ...] = ()


@dataclass
class _Worker:
    number: int
    process: BaseProcess
    connection: Connection
    log: Path
    job: int | None = None
    told: int = 0
    """Bytes of the log that have been shown."""
    log_stays: bool = False


def start_server(module: str) -> ForkServerContext:
    """Begin to import `module` in the process that workers will be forked from, and return at once.

    It is not this process, whose threads would not survive a fork. Signals are for the workers alone: it has them
    blocked, and so has each worker until it can answer.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    with processes_apart():
        forkserver.ensure_running()
    return context


def run_jobs(
    jobs: Sequence[Job],
    open: Open,
    given: Any,
    *,
    count: int,
    console: Console,
    logs: Path,
    done: Collection[int] = (),
    expected: tuple[type[Exception], ...] = (),
) -> None:
    """Do all jobs, up to `count` at a time, each in a process that may have done others before.

    A process is started when there is work for it, and lives until all is done.

    Args:
        open, given: `open(given, reporter)`, called once in each process, returns what does a job there.
        logs: folder for what processes write to standard error, which is shown once the job is done. The file of one
            that went wrong stays.
        done: places of jobs that are done already.
        expected: errors of jobs that are raised here as they are, once all other workers have saved and ended.

    Raises:
        JobFailed: a job raised another error.
        JobLost: a process was killed.
        Interrupted: this process or a worker was asked to stop, and all have saved and ended.
    """
    logs.mkdir(parents=True, exist_ok=True)
    order = Order(open, given, expected, Look.of(console), "")
    pool = _Pool(jobs, set(done), order, count, logs, Bars(console))
    with interruption.deferred():
        try:
            with pool.bars:
                pool.run()
        finally:
            pool.end()
        if pool.ending is not None:
            raise pool.ending
        interruption.check()


class _Pool:
    def __init__(self, jobs: Sequence[Job], done: set[int], order: Order, count: int, logs: Path, bars: Bars) -> None:
        self.jobs, self.order, self.count, self.logs, self.bars = jobs, order, count, logs, bars
        self.server = start_server(order.open.__module__)
        self.workers, self.gone = list[_Worker](), list[_Worker]()
        self.waiting, self.done = [job for job in range(len(jobs)) if job not in done], done
        self.started = 0
        self.ending: BaseException | None = None
        self.stopping = False

    def run(self) -> None:
        """Until all jobs are done, or no worker is left that does one."""
        while True:
            handler = interruption.installed()
            if handler is not None and handler.asked_by is not None:
                self.stop()
            if not self.stopping:
                self.hand_out()
            if all(worker.job is None for worker in self.workers):
                return
            ready = wait([worker.connection for worker in self.workers], POLL)
            for worker in [worker for worker in self.workers if worker.connection in ready]:
                self.hear(worker)

    def hand_out(self) -> None:
        """Give jobs that are ready, the first ones first, to workers that are free or can be started."""
        for job in [job for job in self.waiting if self.done.issuperset(self.jobs[job].after)]:
            free = next((worker for worker in self.workers if worker.job is None), None)
            if free is None:
                if len(self.workers) == self.count:
                    return
                free = self.start()
            self.waiting.remove(job)
            free.job = job
            with suppress(OSError):
                # Of one that is gone the end of its words will be heard.
                free.connection.send(self.jobs[job].task)

    def start(self) -> _Worker:
        """One more worker."""
        log = self.logs / f"worker-{self.started}.log"
        log.unlink(missing_ok=True)
        own, other = self.server.Pipe()
        # No daemon, which may not start processes of its own.
        process = self.server.Process(target=serve, args=(replace(self.order, log=str(log)), other))
        with processes_apart():
            process.start()
        other.close()
        worker = _Worker(self.started, process, own, log)
        self.workers.append(worker)
        self.started += 1
        return worker

    def hear(self, worker: _Worker) -> None:
        """Take one message, or the end of all."""
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            self.lost(worker)
            return
        if isinstance(message, Said):
            self.bars.said(message.text)
        elif isinstance(message, Reached):
            self.bars.reached(worker.number, message)
        elif isinstance(message, Done):
            assert worker.job is not None, "a worker without a job was done with one"
            self.done.add(worker.job)
            worker.job = None
            self.show_log(worker)
        else:
            self.ended(worker, message)

    def ended(self, worker: _Worker, message: Failed | Stopped) -> None:
        """A worker did not do its job, and ends: the others stop."""
        name = self.leave(worker)
        if isinstance(message, Failed) and message.error is None:
            worker.log_stays = True
            self.end_with(JobFailed(f"{name} failed ({message.message}); {worker.log} has the traceback"))
            return
        self.show_log(worker)
        error = message.error if isinstance(message, Failed) else Interrupted(message.asked_by)
        assert error is not None, "of these errors there is one"
        self.end_with(error)

    def lost(self, worker: _Worker) -> None:
        """A worker has ended without a word."""
        free = worker.job is None
        name = self.leave(worker)
        if free:
            # Another one takes its place where there is work.
            return
        code = worker.process.exitcode or 0
        how = f"signal {signal.Signals(-code).name}" if -code in set(signal.Signals) else f"exit code {code}"
        likely = ", as one does that the system kills for want of memory" if code == -signal.SIGKILL else ""
        worker.log_stays = worker.log.exists() and worker.log.stat().st_size > 0
        said = f"; what it wrote is in {worker.log}" if worker.log_stays else ""
        self.end_with(JobLost(f"the worker process of {name} has ended unexpectedly ({how}){likely}{said}"))

    def leave(self, worker: _Worker) -> str:
        """Wait for the end of a worker that sends no more, and take it from the list; the name of its job."""
        name = "no job" if worker.job is None else self.jobs[worker.job].name
        worker.job = None
        self.bars.ended(worker.number)
        self.workers.remove(worker)
        self.gone.append(worker)
        worker.process.join()
        return name

    def end_with(self, error: BaseException) -> None:
        """Stop all workers, and raise `error` once they have ended: the first one, where nobody asked us to stop."""
        handler = interruption.installed()
        if self.ending is None and (handler is None or handler.asked_by is None):
            self.ending = error
        self.stop()

    def stop(self) -> None:
        """Ask the workers to save and end."""
        if not self.stopping:
            self.stopping = True
            for worker in self.workers:
                worker.process.terminate()

    def show_log(self, worker: _Worker) -> None:
        """Print what the worker has written to its standard error since the last time."""
        with worker.log.open("rb") as file:
            file.seek(worker.told)
            text = file.read()
        worker.told += len(text)
        if text:
            sys.stderr.write(text.decode(errors="replace"))
            sys.stderr.flush()

    def end(self) -> None:
        """Let free workers go; those that still have a job, which is after a second Ctrl-C alone, are killed."""
        for worker in self.workers:
            if worker.job is None:
                with suppress(OSError):
                    worker.connection.send(None)
            else:
                worker.process.kill()
        for worker in self.workers:
            worker.process.join()
        for worker in (*self.workers, *self.gone):
            worker.connection.close()
            if not worker.log_stays:
                worker.log.unlink(missing_ok=True)
        if not any(self.logs.iterdir()):
            self.logs.rmdir()
