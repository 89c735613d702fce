"""The table of layers: every layer and parametrization of this torch is in it, and none is silently wrong."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.layers import run as layers
from benchmarks.layers.cases import Case, cases
from benchmarks.layers.torch_names import NOT_LAYERS, weight_functions, with_parameters
from tests.support.paths import ROOT

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
GROUPS = 4


def test_every_layer_and_parametrization_is_in_the_table() -> None:
    covered = {name for case in cases() for name in case.names}
    found = {*with_parameters(), *weight_functions()}
    assert found - covered == set()
    assert {"Linear", "LSTM", "LazyConv2d", "PReLU", "utils.weight_norm", "prune.ln_structured"} <= found
    assert not {"ReLU", "LocalResponseNorm", "CTCLoss", "Dropout"} & found
    assert all(hasattr(nn, name) for name in NOT_LAYERS)


@pytest.mark.parametrize("group", range(GROUPS))
def test_no_entry_is_silently_wrong(group: int) -> None:
    figures = layers.measure(cases()[group::GROUPS])
    assert layers.silently_wrong(figures) == []
    for row in figures["layers"]:
        for name, found in row["providers"].items():
            where = f"{row['layer']}, {row['mode']}, {name}"
            if "max_norm" in row["layer"] or "scale_grad_by_freq" in row["layer"]:
                assert "functional_call: the module Embedding" in found["refused"], where
            elif "packed" in row["layer"] and name == "forward":
                assert "forward mode does not go through layer 'layer'" in found["refused"], where
                assert "take ReverseOverReverse()" in found["refused"], where
            else:
                assert found["error"] <= layers.RIGHT, where
                assert "flagged" not in found, where


class Cut(nn.Linear):
    """Its gradient misses a part of the second derivative."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = super().forward(input)
        return output * output.detach()


def test_a_wrong_layer_is_seen() -> None:
    case = Case("Cut", ("Cut",), lambda: Cut(4, 3), cases()[0].batch)
    figures = {"quick": True, **layers.measure([case])}
    flags = [found.pop("flagged", "") for found in figures["layers"][0]["providers"].values()]
    assert any("lost curvature" in flag for flag in flags)
    assert len(layers.silently_wrong(figures)) == len(layers.PROVIDERS)
    figures["layers"][0]["providers"] = {"reverse": {"error": 0.1, "flagged": "said"}, "forward": {"refused": "no"}}
    assert layers.silently_wrong(figures) == []
    assert "0.1 (1)" in layers.tables(figures)["layers"]


def test_a_run_keeps_figures_and_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "cases", lambda: cases()[:1])
    page, kept = tmp_path / "page.md", tmp_path / "layers.json"
    page.write_text("".join(f"<!-- table {name} -->\n<!-- end -->\n" for name in ("layers", "messages", "left-out")))
    assert layers.main(["--json", str(kept), "--docs", str(page)]) == 0
    assert json.loads(kept.read_text())["layers"][0]["layer"] == "Linear"
    assert "| `Linear` | train |" in page.read_text()
    assert layers.main(["--from", str(kept), "--docs", str(page), "--check"]) == 0


def test_the_page_shows_the_committed_figures() -> None:
    source = ROOT / "benchmarks" / "results" / "layers.json"
    assert layers.main(["--from", str(source), "--docs", str(ROOT / "docs" / "layers.md"), "--check"]) == 0
    figures = json.loads(source.read_text(encoding="utf-8"))
    assert not figures["quick"]
    assert {row["layer"] for row in figures["layers"]} >= {case.title for case in cases()}
