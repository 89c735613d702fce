"""Jobs in several processes: each once and after those it needs, and every way in which one of them ends early."""

import io
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from urllib.error import HTTPError

import pytest
from rich.console import Console

from bilevel import interruption
from bilevel.interruption import Interrupted, Interruption
from recipes.experiment.errors import ConfigError
from recipes.experiment.side_by_side.pool import Job, JobFailed, JobLost, run_jobs
from recipes.experiment.side_by_side.reporter import Reporter
from tests.support.rank_processes import forkserver

SECONDS = 60.0
"""In which everything here must have ended."""


@dataclass(frozen=True)
class Work:
    """What a job does: its `name` goes to the end of a file, then `does` is done."""

    name: str
    does: str = "nothing"


def open_recording(folder: Path, reporter: Reporter) -> Callable[[Work], None]:
    """Writes names of jobs, and the number of the process, as they begin and end."""
    if (folder / "unready").exists():
        raise ConfigError("not ready")

    def do(work: Work) -> None:
        write(folder, [work.name, "begins", os.getpid()])
        if work.does == "pair":
            wait_for(lambda: len(read(folder)) >= 2)
        with interruption.deferred():
            act(work.does, reporter)
        write(folder, [work.name, "ends", os.getpid()])

    return do


def act(does: str, reporter: Reporter) -> None:
    if does == "wait":
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            time.sleep(0.01)
            interruption.check()
    elif does == "pause":
        time.sleep(0.2)
    elif does == "say":
        reporter.console.print("one line")
        print("to standard error", file=sys.stderr)
    elif does == "refuse":
        raise ConfigError("field: bad")
    elif does == "full":
        raise OSError(28, "No space left on device", "a-file")
    elif does == "fault":
        raise ZeroDivisionError("by zero")
    elif does == "not made again":
        raise HTTPError("address", 404, "gone", Message(), None)
    elif does.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[does])
        interruption.check()


def write(folder: Path, record: list[object]) -> None:
    with (folder / "record").open("a") as file:
        file.write(json.dumps(record) + "\n")


def read(folder: Path) -> list[list[object]]:
    path = folder / "record"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(folder: Path, jobs: list[Job], count: int = 2, done: tuple[int, ...] = ()) -> str:
    """What the terminal shows."""
    forkserver()
    shown = io.StringIO()
    console = Console(file=shown, width=100)
    expected = (ConfigError, OSError)
    run_jobs(
        jobs, open_recording, folder, count=count, console=console, logs=folder / "logs", done=done, expected=expected
    )
    return shown.getvalue()


def alive(folder: Path) -> set[int]:
    """Those of the workers that are still there."""
    found = {record[2] for record in read(folder) if isinstance(record[2], int)}
    return {pid for pid in found if Path(f"/proc/{pid}").exists() and "(Z)" not in state(pid)}


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text().split("State:")[1].splitlines()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "(Z)"


def wait_for(met: Callable[[], bool]) -> None:
    until = time.monotonic() + SECONDS
    while not met():
        assert time.monotonic() < until
        time.sleep(0.01)


GRAPHS = {
    "nothing in common": [(), (), (), ()],
    "one after the other": [(), (0,), (1,), (2,)],
    "a fork": [(), (0,), (0,), (0,)],
    "a join": [(), (), (), (0, 1, 2)],
    "two chains": [(), (0,), (), (2,)],
    "a diamond": [(), (0,), (0,), (1, 2)],
}


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("graph", GRAPHS)
def test_each_job_is_done_once_after_those_it_needs(graph: str, count: int, tmp_path: Path) -> None:
    jobs = [Job(f"job {i}", Work(str(i)), after) for i, after in enumerate(GRAPHS[graph])]
    run(tmp_path, jobs, count)
    order = [(name, what) for name, what, _ in read(tmp_path)]
    assert sorted(order) == sorted((str(i), what) for i in range(len(jobs)) for what in ("begins", "ends"))
    for i, after in enumerate(GRAPHS[graph]):
        for other in after:
            assert order.index((str(other), "ends")) < order.index((str(i), "begins"))
    processes = {pid for _, _, pid in read(tmp_path)}
    assert len(processes) <= count
    assert not alive(tmp_path)
    assert not (tmp_path / "logs").exists()


def test_jobs_are_made_at_the_same_time_by_as_many_processes_as_asked_for(tmp_path: Path) -> None:
    run(tmp_path, [Job(str(i), Work(str(i), "pair")) for i in range(6)], count=3)
    under_way, most = 0, 0
    for _, what, _ in read(tmp_path):
        under_way += 1 if what == "begins" else -1
        most = max(most, under_way)
    assert 2 <= most <= 3


def test_what_is_done_already_is_left_out_and_counts_as_done(tmp_path: Path) -> None:
    run(tmp_path, [Job("a", Work("a")), Job("b", Work("b"), (0,)), Job("c", Work("c"), (1,))], done=(0, 1))
    assert [name for name, _, _ in read(tmp_path)] == ["c", "c"]


def test_the_terminal_shows_what_workers_print_and_standard_error_what_they_write_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = run(tmp_path, [Job("a", Work("a", "say")), Job("b", Work("b", "say"))])
    assert shown == "one line\none line\n"
    assert capsys.readouterr().err == "to standard error\n" * 2


@pytest.mark.parametrize(
    ("does", "kind", "said"),
    [("refuse", ConfigError, "^field: bad$"), ("full", OSError, "No space left on device: 'a-file'")],
)
def test_an_expected_error_is_raised_as_it_was_when_all_others_have_stopped(
    does: str, kind: type[Exception], said: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=said):
        run(tmp_path, [Job("a", Work("a", "wait")), Job("b", Work("b", does)), Job("c", Work("c"), (1,))])
    assert not alive(tmp_path)
    # Neither the one that waited nor the one that needed it was done.
    assert [record[:2] for record in read(tmp_path) if record[1] == "ends"] == []
    assert not (tmp_path / "logs").exists()


def test_an_error_before_the_first_job_is_raised_too(tmp_path: Path) -> None:
    (tmp_path / "unready").touch()
    with pytest.raises(ConfigError, match=r"^not ready$"):
        run(tmp_path, [Job("a", Work("a"))])


def test_a_fault_is_a_sentence_and_its_log_has_the_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(JobFailed) as caught:
        run(tmp_path, [Job("the first", Work("a", "fault"))])
    log = tmp_path / "logs" / "worker-0.log"
    assert str(caught.value) == f"the first failed (ZeroDivisionError: by zero); {log} has the traceback"
    assert "Traceback" in log.read_text()
    assert capsys.readouterr().err == ""


def test_a_worker_that_is_killed_is_named_with_its_job(tmp_path: Path) -> None:
    with pytest.raises(JobLost, match=r"^the worker process of the job has ended unexpectedly \(signal SIGKILL\)"):
        run(tmp_path, [Job("another", Work("a", "wait")), Job("the job", Work("b", "SIGKILL"))])
    assert not alive(tmp_path)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_worker_that_is_asked_to_stop_stops_all(name: str, tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as caught:
        run(tmp_path, [Job("a", Work("a", "wait")), Job("b", Work("b", name))])
    assert caught.value.signal is signal.Signals[name]
    assert not alive(tmp_path)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_to_the_run_stops_all_workers(name: str, tmp_path: Path) -> None:
    def send() -> None:
        wait_for(lambda: len(read(tmp_path)) == 2)
        os.kill(os.getpid(), signal.Signals[name])

    sender = threading.Thread(target=send)
    sender.start()
    with Interruption(), pytest.raises(Interrupted) as caught:
        run(tmp_path, [Job("a", Work("a", "wait")), Job("b", Work("b", "wait")), Job("c", Work("c"))])
    sender.join()
    assert caught.value.signal is signal.Signals[name]
    assert not alive(tmp_path)
    assert [what for _, what, _ in read(tmp_path)] == ["begins", "begins"]


def run_elsewhere(folder: str) -> None:
    run(Path(folder), [Job("a", Work("a", "wait")), Job("b", Work("b", "wait"))])


def test_no_worker_outlives_a_run_that_is_killed(tmp_path: Path) -> None:
    process = forkserver().Process(target=run_elsewhere, args=(str(tmp_path),))
    process.start()
    wait_for(lambda: len(read(tmp_path)) == 2)
    assert len(alive(tmp_path)) == 2
    process.kill()
    process.join()
    wait_for(lambda: not alive(tmp_path))


def test_workers_compute_in_processes_of_their_own(tmp_path: Path) -> None:
    run(tmp_path, [Job("a", Work("a"))])
    assert {pid for _, _, pid in read(tmp_path)}.isdisjoint({os.getpid()})
    assert not multiprocessing.active_children()


def test_an_error_that_cannot_travel_is_said_and_its_log_has_the_traceback(tmp_path: Path) -> None:
    """An OSError, as expected ones are, that its arguments do not make again."""
    with pytest.raises(JobFailed, match=r"one failed .*HTTPError: HTTP Error 404: gone.* has the traceback"):
        run(tmp_path, [Job("one", Work("one", "not made again"))])
    (log,) = (tmp_path / "logs").iterdir()
    assert "Traceback" in log.read_text()
    assert not alive(tmp_path)
