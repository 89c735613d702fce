"""What a GPU is asked at once: rehearsed on a CPU, and a part that goes wrong takes nothing from the others."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.alternation.run import SETTINGS
from benchmarks.gpu import page, run
from benchmarks.gpu.parts import Part, failed_tests, read_json, read_outcomes, run_part
from tests.support.paths import ROOT

KEPT, DOCS = ROOT / "benchmarks/results/gpu.json", ROOT / "docs/gpu.md"
CPU = torch.device("cpu")
REDUCED = ["--device=cpu", "--quick", "--only", "tests", "pretext-float32"]
"""A part of each kind, in seconds."""


def code(text: str, **options: Any) -> Part:
    """A part that runs this code, in which `file` is the file to write."""

    def command(file: Path) -> Sequence[str]:
        return ["-c", f"file = {str(file)!r}\n{text}"]

    return Part("part", "a part", 1.0, command, **{"read": read_json, **options})


def test_a_part_that_ends_well_leaves_its_figures(tmp_path: Path) -> None:
    record = run_part(code("open(file, 'w').write('[1, 2]'); print('said')"), tmp_path, 60.0)
    assert record["seconds"] > 0.0
    assert {name: record[name] for name in ("title", "outcome", "message", "figures", "written")} == {
        "title": "a part",
        "outcome": "ok",
        "message": None,
        "figures": [1, 2],
        "written": "",
    }


@pytest.mark.parametrize(
    ("text", "message", "figures"),
    [
        ("open(file, 'w').write('[1]'); raise SystemExit(3)", "it ended with exit code 3", [1]),
        ("print('oh')\nraise SystemExit(3)", "it left no figures (No such file or directory); it ended with", None),
        ("print('no word')", "it left no figures (No such file or directory)", None),
        ("open(file, 'w').write('{')", "it left no figures (Expecting property name", None),
        ("import os; open(file, 'w').write('7'); os.abort()", "it ended with exit code -6", 7),
    ],
)
def test_a_part_that_fails_says_how(text: str, message: str, figures: Any, tmp_path: Path) -> None:
    record = run_part(code(text), tmp_path, 60.0)
    assert record["outcome"] == "failed"
    assert record["message"].startswith(message)
    assert record["figures"] == figures
    assert "oh" in record["written"] or "oh" not in text


def test_figures_that_are_not_as_they_should_be_are_a_failure(tmp_path: Path) -> None:
    part = code("open(file, 'w').write('2')", fault=lambda figures: f"{figures} is even")
    record = run_part(part, tmp_path, 60.0)
    assert (record["outcome"], record["message"], record["figures"]) == ("failed", "2 is even", 2)


def test_a_part_without_an_end_is_ended_with_all_its_processes(tmp_path: Path) -> None:
    started = tmp_path / "started"
    text = f"""
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(file, 'w').write('[5]')
pathlib.Path({str(started)!r}).write_text(str(child.pid))
time.sleep(600)
"""
    record = run_part(code(text), tmp_path, 10.0)
    assert (record["outcome"], record["figures"]) == ("out of time", [5])
    assert record["message"] == "not finished within 10 s"
    stat, deadline = Path(f"/proc/{started.read_text()}/stat"), time.monotonic() + 30.0
    # Gone, or waiting for whoever collects orphans here.
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_every_end_of_a_test_has_its_line(tmp_path: Path) -> None:
    (tmp_path / "test_ends.py").write_text(
        "import pytest\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('no disk')\n"
        "def test_good(record_property): record_property('error', 0.5); record_property('limit', 2.0)\n"
        "def test_bad(): assert 1 == 2, 'not equal'\n"
        "def test_without(broken): pass\n"
        "@pytest.mark.skip(reason='not here')\n"
        "def test_left(): pass\n"
    )
    (tmp_path / "test_unread.py").write_text("import nothing_of_this_name\n")
    chosen = ["-p", "no:cacheprovider", "-p", "benchmarks.gpu.outcomes", "--continue-on-collection-errors"]

    def command(file: Path) -> Sequence[str]:
        return ["-m", "pytest", f"--rootdir={tmp_path}", *chosen, "--outcomes", str(file), str(tmp_path)]

    record = run_part(Part("tests", "tests", 1.0, command, read_outcomes, failed_tests), tmp_path, 120.0)
    figures = record["figures"]
    lines = {line["name"].rpartition("::")[2]: line for line in figures["tests"]}
    assert {name: line["outcome"] for name, line in lines.items()} == {
        "test_good": "passed",
        "test_bad": "failed",
        "test_without": "failed",
        "test_left": "skipped",
        "test_unread.py": "failed",
    }
    assert lines["test_good"]["figures"] == {"error": 0.5, "limit": 2.0}
    assert "not equal" in lines["test_bad"]["message"]
    assert "no disk" in lines["test_without"]["message"]
    assert "not here" in lines["test_left"]["message"]
    assert "nothing_of_this_name" in lines["test_unread.py"]["message"]
    assert (figures["passed"], figures["failed"], figures["skipped"]) == (1, 3, 1)
    assert (record["outcome"], record["message"]) == ("failed", "3 of 5 tests failed; it ended with exit code 1")


@pytest.mark.parametrize(
    ("counts", "message"),
    [((3, 0, 1), None), ((0, 0, 4), "no test has passed"), ((2, 1, 0), "1 of 3 tests failed")],
)
def test_skipped_tests_prove_nothing(counts: tuple[int, int, int], message: str | None) -> None:
    figures = dict(zip(("passed", "failed", "skipped"), counts, strict=True))
    assert failed_tests({**figures, "tests": [{}] * sum(counts)}) == message


def test_the_reduced_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, html = tmp_path / "made" / "gpu.json", tmp_path / "made" / "gpu.html"
    arguments = [*REDUCED, "--limit=5000", "--tests", "tests/bilevel/devices/test_waiting.py"]
    assert run.main([*arguments, "--json", str(kept), "--page", str(html)]) == 0
    record = json.loads(kept.read_text(encoding="utf-8"))
    assert record["rehearsal"]
    assert record["quick"]
    tests, pretext = record["parts"]["tests"]["figures"], record["parts"]["pretext-float32"]["figures"]
    assert tests["passed"] == len(tests["tests"]) == 3
    assert all("[cpu-" in test["name"] for test in tests["tests"])
    assert pretext["step"]["bilevel"]["images_per_second"]["median"] > 0
    assert pretext["peak_memory_mib"]["bilevel"] > 0
    text = html.read_text(encoding="utf-8")
    assert record["environment"]["processor"] in text
    assert page.REHEARSED in text
    assert "pretext step and input pipeline, float32: ok" in capsys.readouterr().out


def test_a_failing_part_leaves_the_others_and_an_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = code("open(file, 'w').write('{}')"), code("print('the reason'); raise SystemExit(5)")
    named = [Part(name, name, 0.1, part.command, part.read) for name, part in (("tests", bad), ("files", good))]
    monkeypatch.setattr(run, "parts", lambda *_, **__: named)
    kept, html = tmp_path / "gpu.json", tmp_path / "gpu.html"
    assert run.main(["--device=cpu", "--limit=600", "--json", str(kept), "--page", str(html)]) == 1
    record = read_json(kept)
    assert {name: part["outcome"] for name, part in record["parts"].items()} == {"tests": "failed", "files": "ok"}
    assert "the reason" in html.read_text(encoding="utf-8")
    # One part made again stands beside what is kept of the others.
    monkeypatch.setattr(run, "parts", lambda *_, **__: [Part("tests", "tests", 0.1, good.command, good.read)])
    assert run.main(["--device=cpu", "--limit=600", "--only", "tests", "--json", str(kept)]) == 0
    assert read_json(kept)["parts"] == {
        "tests": {**read_json(kept)["parts"]["tests"], "outcome": "ok"},
        "files": record["parts"]["files"],
    }


def test_a_device_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        run.main([])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "--device: cuda was asked for, but torch sees no CUDA device; --device cpu --quick rehearses" in message


def test_all_parts_together_stay_under_eight_minutes() -> None:
    chosen = run.parts(CPU, quick=False, tests=["tests"])
    assert tuple(part.name for part in chosen) == run.NAMES
    assert sum(part.share for part in chosen) <= 1.0 + 1e-9
    assert run.LIMIT <= 470.0
    assert set(run.SETTINGS) <= set(SETTINGS)


@pytest.mark.parametrize(("gib", "batch"), [(6, 128), (8, 256), (24, 512), (48, 1024), (80, 1024), (141, 1024)])
def test_the_pretext_batch_fits_into_half_of_the_memory(gib: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    about = SimpleNamespace(total_memory=gib * 2**30, multi_processor_count=7, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    assert run.pretext_batch(torch.device("cuda")) == batch
    assert batch * run.IMAGE <= gib * 2**30 / 2
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    named = run.machine(torch.device("cuda"))
    assert (named["device"], named["device_memory_mib"], named["compute_capability"]) == ("Some GPU", 1024 * gib, "9.0")
    assert json.dumps(named)
    parts = run.parts(torch.device("cuda"), quick=False, tests=["tests"])
    assert f"--batch={batch}" in parts[1].command(Path("x"))
    assert parts[0].command(Path("x"))[3:5] == ["-m", "gpu"]


def test_the_page_shows_the_kept_record() -> None:
    """Which says what it is."""
    record = read_json(KEPT)
    assert run.main(["--from", str(KEPT), "--docs", str(DOCS), "--check"]) == 0
    assert set(record["parts"]) == set(run.NAMES)
    assert record["rehearsal"] == (record["environment"]["device"] == "cpu")
    assert (page.REHEARSED in DOCS.read_text(encoding="utf-8")) == record["rehearsal"]
    assert os.sep + "tmp" not in KEPT.read_text(encoding="utf-8")
