"""The rows of the benchmark of small steps compute what the oracles by hand compute."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import small_steps
from benchmarks.pages import insert
from tests.support.paths import ROOT

KEPT, PAGE = ROOT / "benchmarks" / "results" / "small_steps.json", ROOT / "docs" / "cost.md"


@pytest.mark.parametrize("case", [small_steps.quadratic(8), small_steps.logistic(5)], ids=lambda case: case.name)
def test_oracles_and_hypergradients_agree(case: small_steps.Case) -> None:
    gradient, product, _, direct, slope = small_steps.oracles(case)()  # type: ignore[misc]
    first = small_steps.ROWS["hypergradient, Identity()"](case)()
    assert first.stationarity == pytest.approx(float(gradient.detach().norm()), rel=1e-5)  # type: ignore[attr-defined]
    expected = torch.zeros_like(case.x) if direct is None else direct
    torch.testing.assert_close(first.direct["x"], expected)  # type: ignore[attr-defined]
    step = small_steps.ROWS["hypergradient, Neumann(1), from a start"](case)()
    torch.testing.assert_close(
        step.solution.value["y"],  # type: ignore[attr-defined]
        case.v + small_steps.SCALE * (slope - product),
        rtol=1e-4,
        atol=1e-5,
    )


def test_figures_have_every_row_and_the_page_agrees_with_those_kept(tmp_path: Path) -> None:
    assert small_steps.main(["--quick", "--threads", "1", "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert len(small_steps.rows(figures)) == len(small_steps.ROWS)
    page = PAGE.read_text(encoding="utf-8")
    assert insert(page, small_steps.tables(json.loads(KEPT.read_text(encoding="utf-8")))) == page
