"""Runs whose pictures are read by worker processes: the same results as from memory, whatever befalls them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipes.bissl.commands.main import main
from recipes.vision.pipeline.loader import Loader
from recipes.vision.pipeline.work import Made
from recipes.vision.pipeline.workers import Elsewhere, Later
from tests.support.paths import ROOT
from tests.support.recipes.sample_photographs import encoded, photograph
from tests.support.recipes.small_runs import (
    SMALL_OPTIONS,
    before_steps,
    events,
    execute,
    leave_out_report,
    weights,
    whole_run,
)

PATIENCE = 100.0
"""Seconds in which what must happen has happened, on a machine with much else to do."""


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_report(monkeypatch)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of photographs of many sizes."""
    root = tmp_path_factory.mktemp("pictures")
    for number in range(90):
        folder = root / "abc"[number % 3]
        folder.mkdir(exist_ok=True)
        image = photograph(number, 24 + number % 5, 20 + number % 7)
        (folder / f"{number:02d}.jpg").write_bytes(encoded(image))
    return root


def options(pictures: Path, storage: str = "stream", workers: int = 2) -> list[str]:
    return [
        f"--data.pretext=folder:{pictures}",
        f"--data.downstream=folder:{pictures}",
        f"--data.storage={storage}",
        f"--data.num-workers={workers}",
        "--data.labels-per-class=10",
        "--bissl.upper-steps=4",
        "--seeds=1",
    ]


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all pictures in memory, which nothing interrupts."""
    return whole_run(tmp_path_factory.mktemp("whole"), *options(pictures, "memory"))


def workers_there() -> list[Any]:
    return [process for process in multiprocessing.active_children() if type(process).__name__ == "_Process"]


def until(met: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE
    while not met() and time.monotonic() < end:
        time.sleep(0.02)
    return met()


def at_call(number: int, act: Callable[[], None]) -> Callable[[], None]:
    """Does `act` when it is called for the given time."""
    calls = [0]

    def hook() -> None:
        calls[0] += 1
        if calls[0] == number:
            act()

    return hook


def test_a_streamed_run_is_that_from_memory_and_makes_no_batch_in_vain(
    whole: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stored batches own their memory: what a worker sent is overwritten as soon as views are made of it."""
    begun, given_up, sent = [0], [0], list[Made]()
    begin, finish, give_up = Loader.begin, Loader.finish, Loader.give_up

    def counted(self: Loader, *args: Any, **kwargs: Any) -> Any:
        begun[0] += 1
        return begin(self, *args, **kwargs)

    def poisoned(self: Loader, under_way: Any) -> Any:
        made = finish(self, under_way)
        for each in sent:
            for tensor in (*each.crops, *each.masks):
                tensor.fill_(99)
        sent.clear()
        return made

    def noted(self: Loader, under_way: Any) -> None:
        given_up[0] += 1
        give_up(self, under_way)

    for kind in (Elsewhere, Later):
        result = kind.result

        def remembered(self: Any, result: Callable[[Any], Made] = result) -> Made:
            sent.append(result(self))
            return sent[-1]

        monkeypatch.setattr(kind, "result", remembered)
    monkeypatch.setattr(Loader, "begin", counted)
    monkeypatch.setattr(Loader, "finish", poisoned)
    monkeypatch.setattr(Loader, "give_up", noted)
    assert execute("--output-dir", str(tmp_path), *options(pictures)) == 0
    assert weights(tmp_path) == weights(whole)
    assert begun[0] > 40
    assert given_up == [0]
    assert until(lambda: not workers_there())


@pytest.mark.parametrize("call", [3, 6])
def test_a_run_that_is_stopped_inside_an_alternation_goes_on_with_other_workers(
    call: int, whole: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = "--output-dir", str(tmp_path)
    with monkeypatch.context() as patch:
        before_steps(patch, "bissl", at_call(call, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        assert execute(*arguments, *options(pictures)) == 75
    assert until(lambda: not workers_there())
    assert execute(*arguments, *options(pictures, workers=call % 2), "--resume") == 0
    assert weights(tmp_path) == weights(whole)


@pytest.mark.parametrize(("stage", "call"), [("pretext", 3), ("bissl", 6)])
def test_a_run_that_loses_a_worker_says_so_and_goes_on_later(
    stage: str,
    call: int,
    whole: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = "--output-dir", str(tmp_path)

    def kill() -> None:
        os.kill(workers_there()[0].pid, signal.SIGKILL)

    with monkeypatch.context() as patch:
        before_steps(patch, stage, at_call(call, kill))
        assert execute(*arguments, *options(pictures)) == 76
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.count("run.py: ") == 1
    assert "a worker process" in said
    assert "--resume" in said
    assert until(lambda: not workers_there())
    assert execute(*arguments, *options(pictures), "--resume") == 0
    assert weights(tmp_path) == weights(whole)


def test_a_picture_that_is_gone_during_a_run_is_named(
    whole: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every picture of a class, as where a disk is taken away; put back, the run goes on."""
    arguments = "--output-dir", str(tmp_path)
    contents = {path: path.read_bytes() for path in sorted((pictures / "b").iterdir())}

    def take() -> None:
        for path in contents:
            path.unlink()

    try:
        with monkeypatch.context() as patch:
            before_steps(patch, "pretext", at_call(2, take))
            code = execute(*arguments, *options(pictures))
    finally:
        for path, content in contents.items():
            path.write_bytes(content)
    said = capsys.readouterr().err
    assert code == 2, said
    assert "Traceback" not in said
    assert said.count("run.py: ") == 1
    assert f"{pictures}/b/" in said
    assert "cannot be read" in said
    assert execute(*arguments, *options(pictures), "--resume") == 0
    assert weights(tmp_path) == weights(whole)


def below(process: int) -> list[int]:
    """Processes of the session that this one leads."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == process and fields[0] != "Z":
            found.append(int(path.parent.name))
    return sorted(set(found) - {process})


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_to_all_processes_of_a_run_saves_it_and_leaves_none_behind(
    number: signal.Signals, code: int, whole: Path, pictures: Path, tmp_path: Path
) -> None:
    """As a scheduler and a terminal send it."""
    given = [*SMALL_OPTIONS, "--output-dir", str(tmp_path), *options(pictures), "--finetune.epochs=4000"]
    program = f"import sys; from {main.__module__} import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        [sys.executable, "-c", program, *given],
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )

    def in_finetuning() -> bool:
        if running.poll() is not None:
            return True
        there = (tmp_path / "metrics.jsonl").exists()
        return there and any(line["stage"] == "finetune" for line in events(tmp_path))

    try:
        assert until(in_finetuning)
        # The server that they are forked from, and two workers.
        assert len(below(running.pid)) >= 3
        os.killpg(running.pid, number)
        _, said = running.communicate(timeout=PATIENCE)
    finally:
        running.kill()
        running.wait()
    assert running.returncode == code, said
    assert "Traceback" not in said
    assert said.splitlines()[-1].endswith("saved; the same command with --resume continues")
    assert until(lambda: not below(running.pid))
    stages = weights(tmp_path)
    assert any(name.startswith("bissl") for name in stages)
    assert {name: content for name, content in weights(whole).items() if name in stages} == stages
