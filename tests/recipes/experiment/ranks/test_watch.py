"""A rank that waits in C, where nothing wakes it, is ended once another one is lost; and only then."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.measuring import free_port
from benchmarks.soak import join_all
from recipes.experiment.ranks import watch
from recipes.experiment.ranks.processes import Launch, Ranks
from recipes.experiment.ranks.watch import Watch
from tests.support.rank_processes import forkserver

TIMEOUT = 100.0
CUDA = torch.device("cuda")


def wait_in_c() -> None:
    """As a host that waits for NCCL: without the interpreter's lock, deaf to signals, and for ever."""
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


def one_of_two(rank: int, port: int, log: str, lost: int, how: str) -> None:
    """Join as on GPUs but by gloo alone, with patience of a second; then rank `lost` goes and the other one waits."""
    with open(log, "w", encoding="utf-8") as words:
        os.dup2(words.fileno(), 2)
        sys.stderr = words
        watch.HEARTBEAT, watch.GRACE, watch.PATIENCE = 0.05, 0.5, 1.0
        made = dist.init_process_group
        dist.init_process_group = lambda backend, **options: made("gloo", **options)
        ranks = Ranks(Launch(rank, 2, rank, "127.0.0.1", port))
        ranks.join(CUDA, 200.0 if how == "slow" else 2.0)
        dist.barrier()
        if how == "slow":
            # Alive, and long: several times the patience that a lost rank is met with.
            time.sleep(5.0 if rank == lost else 0.0)
            dist.barrier()
        elif rank != lost:
            wait_in_c()
        elif how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        ranks.leave(3 if how == "code" else 0)
        sys.exit(3 if how == "code" else 0)


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize(("how", "code"), [("killed", 76), ("code", 3), ("stopped", 76)])
def test_a_rank_that_waits_in_c_for_a_lost_one_is_ended(lost: int, how: str, code: int, tmp_path: Path) -> None:
    context, port = forkserver(), free_port()
    logs = [tmp_path / f"rank{rank}.log" for rank in (0, 1)]
    processes = [
        context.Process(target=one_of_two, args=(rank, port, str(log), lost, how)) for rank, log in enumerate(logs)
    ]
    try:
        for process in processes:
            process.start()
        waiting = processes[1 - lost]
        waiting.join(TIMEOUT)
        assert waiting.exitcode == code, [log.read_text() for log in logs]
        said = logs[1 - lost].read_text()
        assert f"rank {1 - lost}: stopped: rank {lost} (process {processes[lost].pid} on " in said, said
        assert ("has ended with exit code 3" in said) == (how == "code"), said
        assert "the same command with --resume continues" in said
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_a_rank_that_computes_long_is_not_lost(tmp_path: Path) -> None:
    context, port = forkserver(), free_port()
    logs = [str(tmp_path / f"rank{rank}.log") for rank in (0, 1)]
    processes = [context.Process(target=one_of_two, args=(rank, port, logs[rank], 1, "slow")) for rank in (0, 1)]
    for process in processes:
        process.start()
    codes = join_all(processes, TIMEOUT)
    for process in processes:
        process.kill()
        process.join()
    assert codes == [0, 0], [Path(log).read_text() for log in logs]


class Store:
    """A store of which the other ranks' part is set by hand."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.fails = False
        self.given = threading.Event()

    def add(self, name: str, number: int) -> int:
        if self.fails:
            raise RuntimeError("Connection reset by peer")
        self.numbers[name] = self.numbers.get(name, 0) + number
        return self.numbers[name]

    def check(self, names: list[str]) -> bool:
        return all(name in self.numbers for name in names)

    def get(self, name: str) -> bytes:
        self.given.set()
        return str(self.numbers[name]).encode()


class Others:
    """Rank 1 of three, beside two whose heartbeats go on in `beating`."""

    def __init__(self, patch: pytest.MonkeyPatch, **options: Any) -> None:
        patch.setattr(watch, "HEARTBEAT", 0.01)
        patch.setattr(watch, "GRACE", 0.1)
        patch.setattr(watch, "PATIENCE", 0.3)
        self.store, self.beating, self.ended = Store(), {0, 2}, list[dict[int, int | None]]()
        self.over, self.met = threading.Event(), threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()
        self.watch = Watch(self.store, 1, 3, end=self._end, **options)  # type: ignore[arg-type]

    def _beat(self) -> None:
        while not self.over.wait(0.005):
            for rank in tuple(self.beating):
                self.store.numbers[f"heartbeat/{rank}"] = self.store.numbers.get(f"heartbeat/{rank}", 0) + 1

    def _end(self, lost: dict[int, int | None]) -> None:
        self.ended.append(lost)
        self.met.set()

    def after(self, change: Callable[[], object], *, ends: bool) -> list[dict[int, int | None]]:
        """What has been ended, some time after the change."""
        try:
            assert not self.met.wait(0.6), "while all were well"
            change()
            assert self.met.wait(TIMEOUT if ends else 1.5) == ends
            return self.ended
        finally:
            self.watch.close()
            self.over.set()


def silence(others: Others, rank: int) -> None:
    others.beating.discard(rank)


def fail(others: Others, code: int) -> None:
    others.store.numbers |= {"exit code/2": code, watch.FAILED: int(code != 0)}


def test_silence_is_a_loss_after_its_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    others = Others(monkeypatch, silent=0.2)
    assert others.after(lambda: silence(others, 2), ends=True) == [{2: None}]
    others = Others(monkeypatch, silent=1000.0)
    assert others.after(lambda: silence(others, 2), ends=False) == []


def test_a_process_that_is_known_to_have_ended_is_not_waited_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = set[int]()
    others = Others(monkeypatch, silent=1000.0, has_ended=lambda rank: rank in gone)
    assert others.after(lambda: (gone.add(2), silence(others, 2)), ends=True) == [{2: None}]


def test_exit_codes_are_heard_of_while_heartbeats_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    others = Others(monkeypatch)
    assert others.after(lambda: fail(others, 74), ends=True) == [{2: 74}]


def test_a_rank_that_ended_well_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    others = Others(monkeypatch, silent=0.2, has_ended=lambda rank: rank == 2)
    assert others.after(lambda: (fail(others, 0), silence(others, 2)), ends=False) == []


def test_a_rank_that_leaves_by_itself_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    others = Others(monkeypatch)
    assert others.after(lambda: (others.watch.leave(), fail(others, 74)), ends=False) == []


@pytest.mark.parametrize("served", [False, True])
def test_a_store_that_is_gone_is_rank_0_where_it_serves_it(served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    others = Others(monkeypatch, served=served)
    found = others.after(lambda: setattr(others.store, "fails", True), ends=not served)
    assert found == ([] if served else [{0: None}])


@pytest.mark.parametrize("ended", [False, True])
def test_rank_0_that_ended_well_may_take_its_store_with_it(ended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = set[int]()
    others = Others(monkeypatch, has_ended=lambda rank: rank in gone)

    def leave() -> None:
        others.store.numbers["exit code/0"] = 0
        assert others.store.given.wait(TIMEOUT), "asked for while it can be"
        others.store.fails = True
        if ended:
            gone.add(0)

    assert others.after(leave, ends=False) == []
