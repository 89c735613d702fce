"""The benchmark of the examination for lost curvature: a short run, and its table."""

import json
from pathlib import Path

import pytest

from benchmarks import curvature


def test_a_quick_run_keeps_figures_and_writes_them_into_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, page = tmp_path / "curvature.json", tmp_path / "page.md"
    page.write_text("<!-- table curvature -->\n<!-- end -->\n", encoding="utf-8")
    monkeypatch.setattr(curvature, "share", lambda images: {"seconds": 50.0, "examination": 0.5, "calls": 4})
    monkeypatch.setattr(
        "sys.argv", ["curvature.py", "--quick", "--images=folder:x", f"--json={kept}", f"--docs={page}"]
    )
    assert curvature.main() == 0
    (row,) = json.loads(kept.read_text(encoding="utf-8"))["structures"].values()
    # 3072 x 64 + 64, 64 x 10 + 10.
    assert row["variables"] == 196672 + 650
    assert row["nodes"] > 20
    assert row["compared"] == 1.0
    assert 0.0 < row["walk"] < row["examination"]
    assert "spends 0.50 s on these, 1.0 %" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", list(curvature.STRUCTURES)[1:3])
def test_the_other_structures_are_healthy(name: str) -> None:
    row = curvature.measure(curvature.STRUCTURES[name])
    assert row["compared"] == 1.0
