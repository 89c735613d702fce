"""One run in a folder, one trainer of a stage: who holds it is named, the dead let go."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipes.experiment.errors import ConfigError
from recipes.experiment.folder import folder_lease
from recipes.experiment.folder.folder_lease import leased
from recipes.experiment.folder.leases import LeaseLost
from recipes.experiment.folder.process_identity import describe, has_ended, identity
from tests.support.recipes.small_runs import execute, files, refused, small_config, small_pipeline

LEASE = ".writer.0.lease"


def check_until_lost(check: Callable[[], None]) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        check()
        time.sleep(0.02)


def forge(folder: Path, **changes: object) -> Path:
    """A lease of another process."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LEASE
    path.write_text(json.dumps({**identity(), **changes}))
    return path


def test_a_second_holder_is_refused_and_told_who_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    said = rf"output-dir: .* in use by process {os.getpid()} on .*, job 4711, seen"
    with leased(tmp_path, "output-dir"), pytest.raises(ConfigError, match=said):
        leased(tmp_path, "output-dir").__enter__()
    with leased(tmp_path, "output-dir"):
        pass
    assert files(tmp_path) == {}


def test_the_lease_is_given_up_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), leased(tmp_path, "x"):
        _ = 1 / 0
    assert files(tmp_path) == {}


@pytest.mark.parametrize("host", ["far", identity()["host"]])
def test_a_process_of_another_machine_holds_until_its_lease_is_over(tmp_path: Path, host: str) -> None:
    # That this machine has no process of the number, or has another one, means nothing; nor does the host's name.
    path = forge(tmp_path, host=host, machine="another boot", pid=999_999_999, started="1")
    with pytest.raises(ConfigError, match=f"process 999999999 on {host}"):
        leased(tmp_path, "x").__enter__()
    old = time.time() - 3600
    os.utime(path, (old, old))
    with leased(tmp_path, "x") as check:
        check()
    assert files(tmp_path) == {}


def test_a_job_that_was_started_again_elsewhere_outwaits_its_earlier_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    forge(tmp_path, host="far", machine="another boot", pid=7, started="1")
    began = time.monotonic()
    with leased(tmp_path, "x", duration=1.5) as check:
        assert time.monotonic() - began >= 1.4
        check()
    assert "earlier attempt of this job, process 7 on far, job 4711; waiting" in capsys.readouterr().err
    # Another job is refused at once, and so is a process of the same job here, which is seen to be alive.
    forge(tmp_path / "b", host="far", machine="another boot", pid=7, started="1", job="4712")
    forge(tmp_path / "c")
    for folder in ("b", "c"):
        with pytest.raises(ConfigError, match="in use"):
            leased(tmp_path / folder, "x", duration=1.5).__enter__()


def test_an_earlier_attempt_that_still_lives_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setattr(folder_lease, "MARGIN", 0.1)
    path = forge(tmp_path, host="far", machine="another boot", pid=7, started="1")
    done = threading.Event()

    def renew() -> None:
        while not done.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="in use by process 7 on far"):
            leased(tmp_path, "x", duration=0.5).__enter__()
    finally:
        done.set()
        thread.join()


def test_a_dead_process_of_this_machine_lets_go_at_once(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    # The same number, later: another process.
    assert has_ended({**identity(), "started": "0"})
    forge(tmp_path, pid=child.pid, started=Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
    with pytest.raises(ConfigError, match="in use"):
        leased(tmp_path, "x").__enter__()
    child.kill()
    child.wait()
    with leased(tmp_path, "x"):
        pass
    assert files(tmp_path) == {}


def test_who_is_alive_is_never_taken_for_dead() -> None:
    me = identity()
    assert not has_ended(me)
    assert not has_ended({**me, "machine": None})
    assert not has_ended({"host": "?", "pid": None})
    assert describe({"host": "a", "pid": 3, "job": None}) == "process 3 on a"


def test_a_holder_that_was_taken_over_is_told_and_leaves_the_new_one_alone(tmp_path: Path) -> None:
    with leased(tmp_path, "x", duration=0.6) as first:
        old = time.time() - 3600
        os.utime(tmp_path / LEASE, (old, old))
        with leased(tmp_path, "x", duration=600):
            with pytest.raises(LeaseLost, match="taken over"):
                check_until_lost(first)
            assert (tmp_path / ".writer.1.lease").exists()


def test_a_run_is_refused_in_a_folder_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = forge(tmp_path / "run", host="far", machine="m", pid=7, started="1", job="88")
    said = refused(capsys, "pretext", "--output-dir", str(tmp_path / "run"))
    assert "output-dir: " in said
    assert "process 7 on far, job 88" in said
    assert files(tmp_path / "run") == {LEASE: path.read_bytes()}
    assert "in use" in refused(capsys, "pretext", "--output-dir", str(tmp_path / "run"), "--overwrite")


def test_a_stage_that_another_run_trains_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store"
    shared = "--artifacts", str(store)
    assert execute("pretext", "--output-dir", str(tmp_path / "a"), *shared) == 0
    (made,) = store.glob("pretext-*")
    # Finished stages are shared freely.
    forge(made, host="far", machine="m", pid=7, started="1")
    assert execute("pretext", "--output-dir", str(tmp_path / "b"), *shared) == 0
    (made / "artifact.json").unlink()
    said = refused(capsys, "pretext", "--output-dir", str(tmp_path / "c"), *shared)
    assert f"artifacts: {made} is in use by process 7 on far" in said
    assert not list(made.glob("step-*"))
    assert not list((tmp_path / "c").glob(".writer*"))


def test_every_stage_leases_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(folder: Path, what: str, **options: Any) -> object:
        seen.append(folder.name.partition("-")[0])
        return leased(folder, what, **options)

    monkeypatch.setattr("recipes.experiment.stage.leased", spy)
    small_pipeline(tmp_path, small_config("--seeds=1")).run()
    assert set(seen) == {"pretext", "head", "bissl", "finetune"}
