"""Worker processes: what they make, what becomes of a run when one of them is lost, and that none outlives its run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recipes.vision.errors import DataError
from recipes.vision.pictures.files import FileItem
from recipes.vision.pipeline import workers as room
from recipes.vision.pipeline.work import EvaluationCrops, Made, RandomCrops, Squares, Work
from recipes.vision.pipeline.workers import (
    BUDGET,
    WorkerLost,
    Workers,
    available_cores,
    cores_to_spare,
    share_of_budget,
)
from recipes.vision.views.evaluation_view import EvalView
from recipes.vision.views.view_policy import ViewPolicy, draw
from tests.support.paths import ROOT
from tests.support.recipes.image_trees import picture
from tests.support.recipes.view_reference import generator

PATIENCE = 60.0
"""Seconds in which what must happen has happened, on a machine with much else to do."""


def until(met: Callable[[], bool]) -> bool:
    """Whether it happens in time."""
    end = time.monotonic() + PATIENCE
    while not met() and time.monotonic() < end:
        time.sleep(0.02)
    return met()


def processes() -> list[int]:
    """The workers of this process."""
    return sorted(p.pid for p in multiprocessing.active_children() if isinstance(p, room._Process) and p.pid)


def is_there(process: int) -> bool:
    """Whether it runs; a dead one that nobody has waited for does not."""
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers(2, budget=2**20)
    yield made
    made.close()
    assert until(lambda: not processes())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(6):
        picture(number, 30 + number, 20 + 3 * number).save(tmp_path / f"{number}.png")
    return tmp_path


def work(folder: Path, numbers: list[int] | None = None, **options: Any) -> Work:
    chosen = list(range(6)) if numbers is None else numbers
    policy = ViewPolicy(size=9, crop_scale=(0.2, 1.0))
    crops = [
        RandomCrops.drawn(policy, draw(policy, len(chosen), generator(3))),
        EvaluationCrops(EvalView(16, 12)),
        Squares(8),
    ]
    return Work([FileItem(str(folder / f"{number}.png")) for number in chosen], crops, **options)


def tensors(made: Made) -> list[Tensor]:
    return [*made.crops, *made.masks]


@pytest.mark.parametrize("way", ["shared memory", "pipe", "no room left"])
def test_workers_make_what_this_process_makes(
    way: str, folder: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "pipe":
        monkeypatch.setattr(room, "shared_memory", lambda: 10_000)
        assert "workers send them through pipes" in str(workers.describe())
    masks = (torch.arange(6 * 20 * 30) % 5).view(6, 20, 30).to(torch.uint8)
    works = [work(folder), work(folder, masks=masks, digests=frozenset({0, 4})), work(folder, [3])]
    expected = [each.run() for each in works]
    if way == "no room left":

        def full(self: Tensor) -> Tensor:
            raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

        monkeypatch.setattr(Tensor, "share_memory_", full)
        found = [room._as_tensors(room._run(each, by_pipe=False)) for each in works]
    else:
        found = [pending.result() for pending in [workers.submit(each) for each in works]]
    for ours, theirs in zip(found, expected, strict=True):
        assert [t.dtype for t in tensors(ours)] == [t.dtype for t in tensors(theirs)]
        assert all(torch.equal(one, other) for one, other in zip(tensors(ours), tensors(theirs), strict=True))
        assert ours.digests == theirs.digests
    assert len(found[1].digests) == 2
    for tensor in tensors(found[0]):
        tensor.fill_(3)
    assert torch.equal(workers.submit(works[0]).result().crops[0], expected[0].crops[0])


def test_without_workers_this_process_makes_it_when_it_is_wanted(folder: Path) -> None:
    workers = Workers(0)
    pending = workers.submit(work(folder))
    (folder / "3.png").unlink()
    with pytest.raises(DataError, match=r"3\.png cannot be read"):
        pending.result()
    assert not processes()
    assert workers.describe() is None
    workers.close()


def test_a_picture_that_cannot_be_read_is_named_and_spoils_no_other_slice(folder: Path, workers: Workers) -> None:
    damaged = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(damaged[:90])
    (folder / "4.png").unlink()
    slices = [workers.submit(work(folder, numbers)) for numbers in ([0, 1], [1, 2, 3], [3], [5, 4], [0, 5])]
    for place, numbers in ((0, [0, 1]), (2, [3]), (4, [0, 5])):
        assert torch.equal(slices[place].result().crops[2], work(folder, numbers).run().crops[2])
    for _ in range(2):
        with pytest.raises(DataError, match=rf"^{folder}/2\.png cannot be decoded"):
            slices[1].result()
        with pytest.raises(DataError, match=rf"^{folder}/4\.png cannot be read \(No such file.*was there when"):
            slices[3].result()
    assert len(processes()) == 2


@pytest.mark.parametrize("which", [0, -1])
@pytest.mark.parametrize("busy", [False, True])
def test_a_lost_worker_is_said_and_the_others_end(which: int, busy: bool, folder: Path) -> None:
    """Whichever it is: one of those who wait holds the lock of the queue that the others wait at."""
    workers = Workers(3)
    for pending in [workers.submit(work(folder, [0])) for _ in range(12)]:
        pending.result()
    started = processes()
    assert started
    under_way = [workers.submit(work(folder, 400 * [5])) for _ in range(6 if busy else 0)]
    os.kill(started[which], signal.SIGKILL)

    def go_on() -> None:
        for pending in under_way:
            pending.result()
        while True:
            workers.submit(work(folder)).result()

    with pytest.raises(WorkerLost, match=r"a worker process .* lower data\.num_workers") as raised:
        go_on()
    assert "\n" not in str(raised.value)
    with pytest.raises(WorkerLost):
        workers.submit(work(folder))
    assert until(lambda: not any(map(is_there, started)))
    # What joins the executor's thread at this process's end does not wait for ever.
    assert until(lambda: not processes())
    workers.close()


@pytest.mark.parametrize("number", sorted(room.SIGNALS))
def test_workers_leave_signals_to_the_run(number: signal.Signals, folder: Path, workers: Workers) -> None:
    expected = workers.submit(work(folder)).result().crops[0]
    before = processes()
    for process in before:
        os.kill(process, number)
    found = [workers.submit(work(folder)).result().crops[0] for _ in range(6)]
    assert all(torch.equal(crops, expected) for crops in found)
    assert set(before) <= set(processes())


def test_this_process_hears_signals_as_before(folder: Path, workers: Workers) -> None:
    main, mask = sys.modules["__main__"], signal.pthread_sigmask(signal.SIG_BLOCK, ())
    workers.submit(work(folder)).result()
    assert sys.modules["__main__"] is main
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask


def test_closing_ends_them_and_they_can_be_had_again(folder: Path, workers: Workers) -> None:
    expected = workers.submit(work(folder)).result().crops[0]
    before = processes()
    for _ in range(40):
        workers.submit(work(folder, 50 * [5]))
    workers.close()
    workers.close()
    assert until(lambda: not any(map(is_there, before)))
    assert torch.equal(workers.submit(work(folder)).result().crops[0], expected)


def test_one_thread_each(folder: Path, workers: Workers) -> None:
    workers.submit(work(folder)).result()
    for process in processes():
        threads = list((Path("/proc") / str(process) / "task").iterdir())
        assert len(threads) < 8


def test_room_is_a_budget_of_all_streams() -> None:
    workers = Workers(0, budget=1000)
    assert workers.room(1000)
    assert not workers.room(1001)
    workers.in_flight = 400
    assert workers.room(600)
    assert not workers.room(601)


def test_what_is_said_of_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers(2, budget=100 * 2**20)
    for free, said in ((64 * 2**20, True), (199 * 2**20, True), (200 * 2**20, False), (None, False)):
        monkeypatch.setattr(room, "shared_memory", lambda free=free: free)
        sentence = workers.describe()
        assert (sentence is not None) == said
    monkeypatch.setattr(room, "shared_memory", lambda: 64 * 2**20)
    assert "has 64 MiB, too little for 200 MiB" in str(workers.describe())
    monkeypatch.undo()
    monkeypatch.setattr(room, "SHARED_MEMORY", Path("/nowhere/at/all"))
    assert room.shared_memory() is None


def test_workers_leave_the_run_its_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert available_cores() >= 1
    for cores, ranks, expected in ((1, None, 1), (2, None, 1), (8, None, 7), (8, 4, 1), (8, 2, 3), (96, None, 16)):
        monkeypatch.setattr(room, "available_cores", lambda cores=cores: cores)
        assert cores_to_spare(ranks) == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cores_to_spare() == 16
    monkeypatch.setattr(room, "available_cores", lambda: 8)
    assert cores_to_spare() == 1


def test_processes_of_a_machine_share_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    for ranks in (1, 2, 8):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert share_of_budget() == BUDGET // ranks
        assert share_of_budget(4) == BUDGET // 4
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert share_of_budget() == BUDGET


SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
with open({log!r}, "a") as log:
    print("imported", file=log)
from recipes.vision.pictures.files import FileItem
from recipes.vision.pipeline.work import Squares, Work
from recipes.vision.pipeline.workers import Workers
workers = Workers(2, budget={budget})
def shapes(count):
    work = Work([FileItem({file!r})] * count, [Squares(64)])
    return [pending.result().crops[0].shape for pending in [workers.submit(work) for _ in range(4)]]
assert shapes(8) == [(8, 3, 64, 64)] * 4
{rest}
"""


def script(folder: Path, rest: str = "", budget: int = 2**20) -> tuple[list[str], Path]:
    """A program without the usual guard, and what it notes each time that it is imported."""
    log, path = folder / "log", folder / "program.py"
    names = {"root": str(ROOT), "log": str(log), "file": str(folder / "1.png"), "budget": budget, "rest": rest}
    path.write_text(SCRIPT.format(**names))
    return [sys.executable, str(path)], log


def test_a_program_without_a_guard_runs_once_and_ends_when_it_loses_a_worker(folder: Path) -> None:
    command, log = script(
        folder,
        "import multiprocessing\n"
        "os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)\n"
        "time.sleep(0.5)\nshapes(1)",
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE)
    assert done.returncode == 1
    assert "WorkerLost: a worker process" in done.stderr
    assert log.read_text() == "imported\n"


def test_workers_end_with_a_program_that_is_killed(folder: Path) -> None:
    command, log = script(
        folder,
        "import multiprocessing\n"
        f"log = open({str(folder / 'log')!r}, 'a')\n"
        "print(*(p.pid for p in multiprocessing.active_children()), file=log, flush=True)\n"
        "shapes(10**6)",
    )
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert until(lambda: log.exists() and log.read_text().count("\n") == 2)
        found = [int(word) for word in log.read_text().splitlines()[1].split()]
        assert len(found) == 2
        assert all(map(is_there, found))
    finally:
        running.kill()
        running.wait()
    assert until(lambda: not any(map(is_there, found)))


def in_small_shared_memory(size: str, command: list[str]) -> list[str]:
    """The command in a mount namespace of its own, whose shared memory is as small as Docker's, or smaller."""
    mount = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", mount, "sh", *command]


def may_mount() -> bool:
    try:
        return subprocess.run(in_small_shared_memory("1m", ["true"]), capture_output=True).returncode == 0
    except OSError:
        return False


FILL = """
try:
    with open("/dev/shm/filled", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
except OSError:
    assert os.statvfs("/dev/shm").f_bavail == 0
assert not workers._by_pipe
assert shapes(8) == [(8, 3, 64, 64)] * 4
assert shapes(3) == [(3, 3, 64, 64)] * 4
"""


@pytest.mark.skipif(not may_mount(), reason="no leave to mount a small shared memory")
def test_shared_memory_that_others_fill_costs_a_copy_alone(folder: Path) -> None:
    command, _ = script(folder, FILL)
    done = subprocess.run(in_small_shared_memory("8m", command), capture_output=True, text=True, timeout=2 * PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_worker_without_memory_is_said_in_a_sentence(error: Exception) -> None:
    future: Future[Any] = Future()
    future.set_exception(error)
    with pytest.raises(WorkerLost, match=r"no memory left; lower data\.num_workers"):
        room.Elsewhere(future).result()


def test_another_error_of_a_worker_stays_what_it_is() -> None:
    future: Future[Any] = Future()
    future.set_exception(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ") as raised:
        room.Elsewhere(future).result()
    assert not isinstance(raised.value, WorkerLost)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_to_all_processes_while_workers_start_is_left_to_the_run(name: str, folder: Path) -> None:
    """The server is importing torch when the signal comes, and the run has a handler."""
    program = f"""
import os, signal
from recipes.vision.pictures.files import FileItem
from recipes.vision.pipeline.work import Squares, Work
from recipes.vision.pipeline.workers import Workers
seen = []
signal.signal(signal.{name}, lambda number, frame: seen.append(number))
workers = Workers(1)
begun = workers.submit(Work([FileItem({str(folder / "0.png")!r})], [Squares(8)]))
os.killpg(os.getpgrp(), signal.{name})
print(tuple(begun.result().crops[0].shape), len(seen))
workers.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("(1, 3, 8, 8) 1\n", "")
