"""The bias of mini-batch systems is measured at a point where the true hypergradient is zero."""

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import batch_bias
from benchmarks.race.finite_sums.contestants import SumProblem
from benchmarks.race.finite_sums.problems import quadratics
from bilevel import CG, hypergradient
from tests.support.paths import ROOT


def test_the_hypergradient_of_the_whole_set_is_zero_at_the_optimum() -> None:
    problem = quadratics(samples=64, size=5)
    x, y = batch_bias.optimum(problem)
    below, above = (batch_bias.in_float64(data) for data in (problem.lower_data, problem.upper_data))
    found = hypergradient(SumProblem(problem), x, y, CG(50, 1e-12), upper_batch=above, lower_batches=[below])
    assert torch.linalg.vector_norm(found.grad["x"]) < 1e-5
    assert found.stationarity < 1e-5
    assert torch.linalg.vector_norm(found.direct["x"]) > 1e-2


def test_few_rows_are_biased_and_all_are_not() -> None:
    problem = quadratics(samples=64, size=5)
    few, error = batch_bias.bias(problem, CG(50, 1e-10), 8, 100)
    every, _ = batch_bias.bias(problem, CG(50, 1e-10), 64, 2)
    assert few > 2.0 * error > 0.0
    assert every < 1e-5


def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = quadratics(samples=64, size=5)
    monkeypatch.setattr(batch_bias, "quadratics", lambda: small)
    monkeypatch.setattr(batch_bias, "DRAWS", {8: 3, 64: 1})
    path = tmp_path / "figures.json"
    assert batch_bias.main(["--quick", "--json", str(path)]) == 0
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert set(figures["bias"]) == {"8", "64"}
    assert set(figures["bias"]["8"]) == set(batch_bias.SOLVERS)


def test_the_page_shows_the_kept_figures() -> None:
    kept = json.loads((ROOT / "benchmarks" / "results" / "batch_bias.json").read_text(encoding="utf-8"))["bias"]
    page = (ROOT / "docs" / "choosing_method.md").read_text(encoding="utf-8")
    for title, rows in (("64", "64"), ("256", "256"), ("all 1024", "1024")):
        (line,) = re.findall(rf"^\| {title} \| (.*) \|$", page, re.M)
        shown = [float(cell.split(" ± ")[0]) for cell in line.split(" | ")]
        assert shown == pytest.approx([kept[rows][name]["bias"] for name in batch_bias.SOLVERS], rel=0.06)
