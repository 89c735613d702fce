"""The report's files, and its text."""

import json
import sys
from pathlib import Path

import pytest

from bilevel import CG, Neumann
from bilevel.compare import SolverReport, compare_solvers
from tests.bilevel.compare.points import ALL, Point


@pytest.fixture(scope="module")
def report() -> SolverReport:
    solvers = {"CG": lambda n: CG(n, None), "Neumann": Neumann, "mine": CG(3, 1e-2)}
    point = Point([0.5, 1.0, 1.5, 2.0, 3.0], spread=0.1)
    return compare_solvers(**point.arguments, solvers=solvers, iterations=(1, 3, 5), seconds=ALL)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_files(report: SolverReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    folder = tmp_path / "new" / "folder"
    written = report.save(folder)
    assert files(folder) == {path.name for path in written} == {"report.md", "curves.json", "picture.svg"}
    kept = SolverReport(json.loads((folder / "curves.json").read_text(encoding="utf-8")))
    assert (kept.recommended, kept.target, kept.advice) == (report.recommended, report.target, report.advice)
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert text == kept.markdown(
        picture="![Relative error of every solver against products and against time](picture.svg)"
    )
    assert "| mine |" in text
    picture = (folder / "picture.svg").read_text(encoding="utf-8")
    assert all(word in picture for word in ("Quadratic: first right-hand side", "mine", "noise of the batches"))


def test_every_sentence_and_solver_is_printed(report: SolverReport) -> None:
    text = " ".join(str(report).split())
    assert all(sentence in text for sentence in report.advice)
    assert all(f"│ {solver} │" in text for solver in ("CG", "Neumann", "mine"))
    assert "2 right-hand sides one after the other" in text
    assert max(map(len, str(report).splitlines())) <= 120


def test_a_folder_that_holds_something_is_left_alone(report: SolverReport, tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds files already.*overwrite=True"):
        report.save(tmp_path)
    assert files(tmp_path) == {"report.md"}
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == "mine"
    (tmp_path / "other").touch()
    report.save(tmp_path, overwrite=True)
    assert files(tmp_path) >= {"report.md", "curves.json", "other"}
    assert (tmp_path / "report.md").read_text(encoding="utf-8").startswith("# Solvers on Quadratic: 5 variables")


def test_a_file_is_no_folder(report: SolverReport, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; name a folder"):
        report.save(tmp_path / "file", overwrite=True)


def test_without_matplotlib(report: SolverReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "picture.svg").write_text("of another report", encoding="utf-8")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.save(tmp_path, overwrite=True)
    assert files(tmp_path) == {"report.md", "curves.json"}
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "a picture needs matplotlib" in text
    assert "pip install matplotlib" in text
    with pytest.raises(ValueError, match="pip install matplotlib"):
        report.picture()
