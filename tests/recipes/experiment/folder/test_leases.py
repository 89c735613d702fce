"""Leases on shared work: one holder, abandoned work taken over, no trust in clocks."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.experiment.folder.leases import Lease, LeaseLost, Leases
from tests.support.paths import ROOT


def test_of_many_one_gets_the_lease(tmp_path: Path) -> None:
    barrier, taken = threading.Barrier(8), []

    def attempt() -> None:
        leases = Leases(tmp_path, duration=60)
        barrier.wait()
        taken.append(leases.take("007"))

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(lease is not None for lease in taken) == 1
    holder = Leases(tmp_path, duration=60).holder("007")
    assert holder is not None
    assert holder["pid"] == os.getpid()
    assert Leases(tmp_path, duration=60).holder("008") is None


def check_until_lost(lease: Lease) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        lease.check()
        time.sleep(0.02)


def test_an_abandoned_lease_is_taken_over_once_and_its_holder_told(tmp_path: Path) -> None:
    leases = Leases(tmp_path, duration=0.6)
    first = leases.take("000")
    assert first is not None
    assert leases.take("000") is None
    with first.kept():
        # Long past its duration, by the clock of the file system.
        old = time.time() - 3600
        os.utime(tmp_path / "000.0.lease", (old, old))
        second = leases.take("000")
        assert second is not None
        assert leases.take("000") is None
        with pytest.raises(LeaseLost, match="taken over"):
            check_until_lost(first)
        second.check()
    assert leases.take("000") is None, "the old holder must not give up what is another's"
    leases.clear("000")
    assert not list(tmp_path.glob("*.lease"))


def test_a_holder_that_slept_through_its_successors_work_is_told(tmp_path: Path) -> None:
    leases = Leases(tmp_path, duration=0.6)
    first = leases.take("000")
    assert first is not None
    with first.kept():
        old = time.time() - 3600
        os.utime(tmp_path / "000.0.lease", (old, old))
        second = leases.take("000")
        assert second is not None
        with second.kept():
            pass
        assert not list(tmp_path.glob("*.lease"))
        with pytest.raises(LeaseLost, match="taken over"):
            check_until_lost(first)


HOLDER = """
import sys, time
from pathlib import Path
from recipes.experiment.folder.leases import LeaseLost, Leases
lease = Leases(Path(sys.argv[1]), duration=1.0).take("000")
with lease.kept():
    print("taken", flush=True)
    try:
        while True:
            lease.check()
            time.sleep(0.01)
    except LeaseLost as error:
        print(error, flush=True)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lease on "000"."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        yield process
        process.kill()


def test_a_killed_process_is_taken_over_at_once(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    leases = Leases(tmp_path, duration=600)
    assert leases.take("000") is None
    holder.kill()
    holder.wait()
    assert leases.take("000") is not None


def test_a_stopped_process_that_was_taken_over_is_told_when_it_goes_on(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    leases = Leases(tmp_path, duration=1.0)
    holder.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 30
    while (lease := leases.take("000")) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert lease is not None
    with lease.kept():
        holder.send_signal(signal.SIGCONT)
        assert "was taken over" in holder.communicate(timeout=30)[0]
        lease.check()


def test_age_is_that_of_the_file_systems_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leases = Leases(tmp_path, duration=60)
    assert leases.take("000") is not None
    # A machine whose own clock is a day ahead sees a fresh lease all the same.
    monkeypatch.setattr(time, "time", lambda: 86400.0 + 1e9)
    assert leases.take("000") is None
    holder = leases.holder("000")
    assert holder is not None
    assert -1 < holder["age"] < 30


def test_a_lease_that_is_kept_outlives_its_duration(tmp_path: Path) -> None:
    leases = Leases(tmp_path, duration=1.0)
    lease = leases.take("000")
    assert lease is not None
    with lease.kept():
        for _ in range(16):
            time.sleep(0.1)
            assert leases.take("000") is None
        lease.check()
    assert leases.take("000") is not None
