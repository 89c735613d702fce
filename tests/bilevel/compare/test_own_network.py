"""The example of the documentation, a network of timm: the comparison takes at most ten lines, and works."""

import re
from pathlib import Path
from typing import Any

import pytest

from bilevel.compare import SolverReport
from tests.support.paths import ROOT

PAGE = (ROOT / "docs/choosing.md").read_text(encoding="utf-8")
PROBLEM, COMPARISON = re.findall(r"^```py\n(.*?)^```$", PAGE, re.M | re.S)


def test_the_comparison_is_short() -> None:
    lines = [line for line in COMPARISON.splitlines() if line.strip()]
    assert len(lines) <= 10
    assert any("compare_solvers(" in line for line in lines)


def test_a_network_of_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As on the page, in less time."""
    pytest.importorskip("timm", reason="the network is built with timm, of the extra timm")
    pytest.importorskip("sklearn", reason="the digits are those of scikit-learn, of the extra demo")
    monkeypatch.chdir(tmp_path)
    assert "seconds=120" in COMPARISON
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(PROBLEM, "choosing.md", "exec"), names)
    buffers = {name: buffer.clone() for name, buffer in names["problem"].network.named_buffers()}
    exec(compile(COMPARISON.replace("seconds=120", "seconds=6"), "choosing.md", "exec"), names)
    report = names["report"]
    assert isinstance(report, SolverReport)
    assert {"CG", "Neumann"} <= {row["solver"] for row in report.figures["curves"]}
    assert capsys.readouterr().out.startswith("Solvers on FineTuning: 373,658 variables, 2 lower batches")
    assert {"report.md", "curves.json"} <= {path.name for path in (tmp_path / "solvers").iterdir()}
    after = dict(names["problem"].network.named_buffers())
    assert all(bool((after[name] == buffer).all()) for name, buffer in buffers.items())
