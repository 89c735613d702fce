"""Claims on shared work: one holder, abandoned work taken over, no trust in clocks."""

import os
import threading
import time
from pathlib import Path

import pytest

from recipes.experiment.folder.leases import Claim, ClaimLost, Claims


def test_of_many_one_gets_the_claim(tmp_path: Path) -> None:
    barrier, taken = threading.Barrier(8), []

    def attempt() -> None:
        claims = Claims(tmp_path, lease=60)
        barrier.wait()
        taken.append(claims.take("007"))

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(claim is not None for claim in taken) == 1
    holder = Claims(tmp_path, lease=60).holder("007")
    assert holder is not None
    assert holder["pid"] == os.getpid()
    assert Claims(tmp_path, lease=60).holder("008") is None


def check_until_lost(claim: Claim) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        claim.check()
        time.sleep(0.02)


def test_an_abandoned_claim_is_taken_over_once_and_its_holder_told(tmp_path: Path) -> None:
    claims = Claims(tmp_path, lease=0.6)
    first = claims.take("000")
    assert first is not None
    assert claims.take("000") is None
    with first.kept():
        # Long past a lease, by the clock of the file system.
        old = time.time() - 3600
        os.utime(tmp_path / "000.0.claim", (old, old))
        second = claims.take("000")
        assert second is not None
        assert claims.take("000") is None
        with pytest.raises(ClaimLost, match="taken over"):
            check_until_lost(first)
        second.check()
    assert claims.take("000") is None, "the old holder must not give up what is another's"
    claims.clear("000")
    assert not list(tmp_path.glob("*.claim"))


def test_age_is_that_of_the_file_systems_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claims = Claims(tmp_path, lease=60)
    assert claims.take("000") is not None
    # A machine whose own clock is a day ahead sees a fresh claim all the same.
    monkeypatch.setattr(time, "time", lambda: 86400.0 + 1e9)
    assert claims.take("000") is None
    holder = claims.holder("000")
    assert holder is not None
    assert -1 < holder["age"] < 30


def test_a_claim_that_is_kept_outlives_its_lease(tmp_path: Path) -> None:
    claims = Claims(tmp_path, lease=1.0)
    claim = claims.take("000")
    assert claim is not None
    with claim.kept():
        for _ in range(16):
            time.sleep(0.1)
            assert claims.take("000") is None
        claim.check()
    assert claims.take("000") is not None
