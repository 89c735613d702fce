"""The command ``python -m bilevel.compare``: what it writes, and what it says of bad input."""

import subprocess
import sys
from pathlib import Path

import pytest

from bilevel.compare import command
from tests.support.paths import ROOT

CASES = """
import torch
from bilevel import CG, Neumann
from tests.bilevel.compare.points import Point

def make():
    solvers = {"CG": lambda n: CG(n, None), "Neumann": Neumann}
    return {**Point([0.5, 1.0, 1.5, 2.0]).arguments, "solvers": solvers, "iterations": (1, 2), "seconds": 1e6}

def nothing():
    return None

def incomplete():
    return {"problem": 1, "uper": 2}

def fails():
    raise KeyError("no such data")

def unfit():
    return {**make(), "upper_batches": 3}

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder, with modules that nobody has imported."""
    (tmp_path / "some_cases.py").write_text(CASES, encoding="utf-8")
    (tmp_path / "broken_case.py").write_text("import torch\nimport not_there_at_all\n", encoding="utf-8")
    (tmp_path / "typo_case.py").write_text("import torch\nx = 1 +\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in ("some_cases", "broken_case", "typo_case"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_a_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["some_cases:make", "--out", "found"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Solvers on Quadratic: 4 variables, 3 lower batches")
    assert {"report.md", "curves.json"} <= {path.name for path in (folder / "found").iterdir()}
    before = (folder / "found" / "report.md").read_bytes()
    assert command.main(["some_cases:make", "--out", "found"]) == 2
    assert "--force" in capsys.readouterr().err
    assert (folder / "found" / "report.md").read_bytes() == before
    assert command.main(["some_cases:make", "--out", "found", "--force"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["some_cases"], ["module:factory", "got 'some_cases'"]),
        (["some_cases.py:make"], ["module:factory", "got 'some_cases.py:make'"]),
        ([":make"], ["module:factory"]),
        (["some_cases:"], ["module:factory"]),
        (["no_such_case:make"], ["there is no module no_such_case"]),
        (["torch.no_such_case:make"], ["there is no module torch.no_such_case"]),
        (["some_cases:absent"], ["some_cases has no function 'absent'"]),
        (["some_cases:number"], ["some_cases has no function 'number'"]),
        (["some_cases:nothing"], ["some_cases:nothing returned a NoneType", "upper_batches"]),
        (["some_cases:incomplete"], ["has no upper, lower, upper_batches, lower_batches and has 'uper'"]),
        (["some_cases:fails"], ["some_cases:fails failed: KeyError: 'no such data'", "some_cases.py, line"]),
        (["some_cases:unfit"], ["compare_solvers failed: TypeError: upper_batches must be a list", "got 3"]),
        (["broken_case:make"], ["importing broken_case failed", "not_there_at_all", "broken_case.py, line 2"]),
        (["typo_case:make"], ["importing typo_case failed: SyntaxError"]),
        (["some_cases:make", "--seconds", "0"], ["seconds must be a positive number, got 0.0"]),
        (["some_cases:make", "--out", "some_cases.py"], ["some_cases.py is a file; name a folder"]),
    ],
)
def test_bad_input(arguments: list[str], words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name for path in folder.iterdir()}
    assert command.main(arguments) == 2
    said = capsys.readouterr()
    assert not said.out
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("python -m bilevel.compare: error: ")
    assert all(word in said.err for word in words), said.err
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == before


@pytest.mark.parametrize("arguments", [[], ["--seconds", "soon", "a:b"], ["a:b", "--unknown"]])
def test_a_wrong_option(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert "usage: python -m bilevel.compare" in capsys.readouterr().err


def test_as_a_program(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "bilevel.compare", *arguments]
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)

    helped = run("--help")
    assert (helped.returncode, helped.stderr) == (0, "")
    assert "module:factory" in helped.stdout
    wrong = run("no_such_case:make")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == (
        "python -m bilevel.compare: error: there is no module no_such_case, neither in this folder nor installed\n"
    )
