"""A slow-down that is planted in a repository is found, and nothing where nothing was planted.

Planted ones are many times slower and the threshold is a factor of 2, so that no outcome hangs on the machine.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.guard import run
from benchmarks.guard.run import main
from tests.benchmarks.guard.repositories import repository
from tests.support.paths import ROOT

SHORT, LONG = 0.02, 0.4
FEW, MANY = 0.01, 0.1
COMMANDS = "import time\nwhile time.process_time() < {}: pass\n"
WAITING = "import time\ntime.sleep(600)\n"
LIBRARY = """
import time
def waits(): time.sleep({waits})
def computes():
    until = time.process_time() + {computes}
    while time.process_time() < until: pass
"""
WORKLOAD = """
import bilevel
ROWS = {
    "waits": lambda folder: bilevel.waits,
    "computes": lambda folder: bilevel.computes,
    "writes": lambda folder: lambda: (folder / "file").write_text("x") and bilevel.waits(),
    "newer": lambda folder: bilevel.newer,
}
"""
LATER = "from bilevel import newer\nROWS = {'one': lambda folder: newer, 'two': lambda folder: newer}\n"


def library(waits: float = SHORT, computes: float = FEW, more: str = "") -> str:
    return LIBRARY.format(waits=waits, computes=computes) + more


def compared(
    folder: Path, monkeypatch: pytest.MonkeyPatch, old: dict[str, str], new: dict[str, str], *options: str
) -> tuple[int, dict[str, str]]:
    """Exit code, and the verdicts by row."""
    repository(folder / "checkout", old, new)
    (folder / "workloads").mkdir()
    files = {"own": WORKLOAD, "later": LATER}
    for name, source in files.items():
        (folder / "workloads" / f"{name}.py").write_text(source, encoding="utf-8")
    monkeypatch.setattr(run, "WORKLOADS", {name: folder / "workloads" / f"{name}.py" for name in files})
    monkeypatch.setattr(run, "GROUPS", (run.STARTS, *files))
    figures = folder / "figures.json"
    given = ["--tree", str(folder / "checkout"), "--quick", "--threshold", "100%", "--json", str(figures)]
    code = main([*given, *options])
    rows = json.loads(figures.read_text(encoding="utf-8"))["rows"]
    return code, {name: row["verdict"] for name, row in rows.items()}


def test_planted_slow_downs_are_found_and_others_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    newer = "newer = waits"
    old = {"bilevel/__init__.py": library(), "recipes/bissl/run.py": COMMANDS.format(0.0)}
    new = {"bilevel/__init__.py": library(waits=LONG, more=newer)}
    code, said = compared(tmp_path, monkeypatch, old, new, "--rows", "own", "later")
    assert code == 1
    assert said["own: waits"].startswith("slower by ")
    assert said["own: waits"].endswith("% by the clock")
    assert "slower" in said["own: writes"]
    for name in ("own: newer", "later: one", "later: two"):
        assert said.pop(name).startswith("not comparable: ")
    assert set(said) == {"own: waits", "own: computes", "own: writes"}
    printed = capsys.readouterr().out
    assert "own: computes" in printed
    assert "module 'bilevel' has no attribute 'newer'" in " ".join(printed.split()).replace("│ ", "")


@pytest.mark.parametrize("slower", [True, False])
def test_processor_time_either_way(slower: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = library(computes=MANY), library(computes=FEW)
    old, new = (other, one) if slower else (one, other)
    code, said = compared(
        tmp_path, monkeypatch, {"bilevel/__init__.py": old}, {"bilevel/__init__.py": new}, "--rows", "own"
    )
    assert code == int(slower)
    assert said["own: computes"].startswith("slower by " if slower else "faster by ")


def test_nothing_planted_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"bilevel/__init__.py": library(), "recipes/bissl/run.py": COMMANDS.format(0.0)}
    code, said = compared(tmp_path, monkeypatch, files, {}, "--rows", "start-up", "own")
    assert code == 0
    assert {*run.STARTED, "own: waits", "own: computes"} < set(said)


def test_a_command_that_starts_slowly_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = {"bilevel/__init__.py": "", "recipes/bissl/run.py": COMMANDS.format(0.0)}
    new = {"recipes/bissl/run.py": COMMANDS.format(0.7)}
    code, said = compared(tmp_path, monkeypatch, old, new, "--rows", "start-up")
    assert code == 1
    for name in ("run.py --help", "run.py --dry-run"):
        assert said[name].startswith("slower by ")


def test_what_fails_in_the_working_tree_is_an_error_and_what_fails_in_the_commit_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {"bilevel/__init__.py": library(), "recipes/bissl/run.py": "raise SystemExit('too old')"}
    new = {"bilevel/__init__.py": "raise ImportError('broken')", "recipes/bissl/run.py": COMMANDS.format(0.0)}
    code, said = compared(tmp_path, monkeypatch, old, new, "--rows", "start-up", "own")
    assert code == 1
    assert said["run.py --help"] == said["run.py --dry-run"] == "not comparable: too old"
    assert said["import bilevel"] == "fails in the working tree: ImportError: broken"
    assert said["own"] == "fails in the working tree: ImportError: broken"


def test_a_row_that_fails_while_it_is_timed_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once = "called = []\ndef waits():\n    called.append(1)\n    if len(called) > 3: raise ValueError('no more')\n"
    old, new = {"bilevel/__init__.py": library()}, {"bilevel/__init__.py": library(more=once)}
    code, said = compared(tmp_path, monkeypatch, old, new, "--rows", "own")
    assert code == 1
    assert said["own: waits"] == "fails in the working tree: ValueError: no more"
    assert "difference" in said["own: computes"] or "er by" in said["own: computes"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--against", "nowhere"], r"--against: .* has no commit 'nowhere'; git log lists them"),
        (["--tree", "/nowhere"], r"--tree: /nowhere is no git checkout .*; name the folder of one"),
        (["--pairs", "5"], "--pairs: 5 are too few for an interval; give at least 6"),
        (["--threads", "0"], "--threads: 0 was given; it must be at least 1"),
        (["--threshold", "much"], "'much' is no percentage of 0% or more; give one such as 5%"),
        (["--threshold=-1%"], "'-1%' is no percentage"),
        (["--threshold", "nan"], "'nan' is no percentage"),
        (["--rows", "everything"], "invalid choice: 'everything'"),
    ],
)
def test_bad_input_is_said_in_words(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository(tmp_path / "checkout", {"bilevel/__init__.py": ""}, {})
    try:
        code = main(["--tree", str(tmp_path / "checkout"), *options])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert_matches(said, printed.err)


def assert_matches(pattern: str, text: str) -> None:
    with pytest.raises(RuntimeError, match=pattern):
        raise RuntimeError(" ".join(text.split()))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_a_signal_it_leaves_nothing(number: signal.Signals, code: int, tmp_path: Path) -> None:
    files = {"bilevel/__init__.py": "", "recipes/bissl/run.py": WAITING}
    repository(tmp_path / "checkout", files, {})
    (tmp_path / "tmp").mkdir()
    guard = subprocess.Popen(
        [sys.executable, str(ROOT / "benchmarks" / "guard" / "run.py"), "--tree", str(tmp_path / "checkout")],
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
        # A shell may have started the tests with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        while not list((tmp_path / "tmp").glob("guard-*/tree/recipes")):
            assert guard.poll() is None
            time.sleep(0.05)
        guard.send_signal(number)
        assert guard.wait(60) == code
    finally:
        guard.kill()
        guard.wait()
    assert not list((tmp_path / "tmp").iterdir())
