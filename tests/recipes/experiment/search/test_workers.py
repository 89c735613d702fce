"""Worker processes of one search end with the process that started them."""

import os
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

from recipes.experiment.search.workers import run_workers


def wait_for(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def note(folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()


def note_and_stay(folder: str) -> None:
    note(folder)
    time.sleep(600)


def end_with_three(folder: str) -> None:
    note(folder)
    raise SystemExit(3)


def run_elsewhere(folder: str) -> None:
    run_workers(note_and_stay, folder, 2)


def test_no_worker_outlives_the_process_that_is_killed(tmp_path: Path) -> None:
    process = get_context("forkserver").Process(target=run_elsewhere, args=(str(tmp_path),))
    process.start()
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    workers = [int(path.name) for path in tmp_path.iterdir()]
    assert all(is_running(pid) for pid in workers)
    process.kill()
    process.join()
    wait_for(lambda: not any(is_running(pid) for pid in workers))


def test_exit_codes_other_than_0_are_told(tmp_path: Path) -> None:
    assert run_workers(note, str(tmp_path), 2) == []
    assert len(list(tmp_path.iterdir())) == 2
    assert run_workers(end_with_three, str(tmp_path), 2) == [3, 3]
