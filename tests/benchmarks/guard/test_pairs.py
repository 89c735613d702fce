"""A workload that hangs is ended, and hangs nothing else."""

import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from benchmarks.guard import pairs
from benchmarks.guard.commands import ChildError
from benchmarks.guard.pairs import NEW, OLD, Comparison, Row, Server

HANGING = """
import sys, time
print('{"own: waits": null, "own: computes": null}', flush=True)
sys.stdin.readline()
print('{"processor": 1.0, "clock": 2.0}', flush=True)
sys.stdin.readline()
time.sleep(600)
"""
SAID = "a workload did not answer within .* seconds, and its process was ended"


@pytest.fixture
def hanging() -> Iterator["subprocess.Popen[str]"]:
    """A server that answers one call."""
    command = [sys.executable, "-c", HANGING]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_call_without_an_answer_ends_its_process(
    hanging: "subprocess.Popen[str]", monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(hanging, StringIO(), ["own"])
    assert server.problems == {"own: waits": None, "own: computes": None}
    assert server.timed("own: waits").clock == 2.0
    monkeypatch.setattr(pairs, "TIMEOUT", 0.2)
    with pytest.raises(ChildError, match=SAID):
        server.timed("own: computes")
    assert hanging.wait(60) == -9
    # Of rows that it was to time afterwards the same is said.
    with pytest.raises(ChildError, match=SAID):
        server.timed("own: waits")


def test_files_that_hang_while_they_are_loaded_are_not_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, started = tmp_path / "own.py", list[Any]()
    file.write_text("import time\ntime.sleep(600)\n")
    (tmp_path / "bilevel").mkdir()
    (tmp_path / "bilevel" / "__init__.py").touch()
    monkeypatch.setattr(pairs, "TIMEOUT", 0.2)
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **options: started.append(given) or real(*given, **options))
    comparison, rows = Comparison({OLD: tmp_path, NEW: tmp_path}), dict[str, Row]()
    for number in range(3):
        comparison.workloads([file], rows, number)
    assert len(started) == 2
    assert set(rows) == {"own"}
    assert set(rows["own"].problem) == {OLD, NEW}
    assert all("did not answer within" in why for why in rows["own"].problem.values())
