"""The page on hyperparameters of a network: its reference by differences, its tables, the sentences that hold."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("timm", reason="the networks are built with timm, of the extra timm")

from benchmarks.networks import measure, problems, run, tables
from tests.support.paths import ROOT

KEPT = ROOT / "benchmarks/results/networks.json"
PAGE = ROOT / "docs/networks.md"
FIGURES: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8"))
SMALL = problems.Size(images=20, steps=8, further=3, iterations=4)


@pytest.fixture
def double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", problems.NETWORKS)
def test_response_is_the_derivative_of_further_training(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "STEP", dict.fromkeys(problems.KINDS, 1e-5))
    setting = problems.Setting(problems.NETWORKS[name], 0, SMALL)
    point = setting.trained(4)
    for kind, g in setting.response(point, 3).items():
        assert setting.difference(point, kind, g / g.norm(), 3) == pytest.approx(float(g.norm()), rel=1e-3), kind


@pytest.mark.usefixtures("double")
def test_a_training_can_be_cut_and_is_torchs() -> None:
    setting = problems.Setting(problems.NETWORKS["CNN"], 0, SMALL)
    whole, half = setting.trained(4), setting.trained(2)
    again = setting.trained(2, half)
    variables = {name: p.detach().clone().requires_grad_() for name, p in setting.module.named_parameters()}
    optimizer = torch.optim.Adam(variables.values(), lr=problems.NETWORKS["CNN"].rate)
    for _ in range(4):
        optimizer.zero_grad()
        setting.problem.lower_objective(setting.upper, variables, setting.train).backward()
        optimizer.step()
    for name, leaf in whole.lower.items():
        assert torch.equal(again.lower[name], leaf)
        torch.testing.assert_close(variables[name].detach(), leaf, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(again.buffers[name], buffer) for name, buffer in whole.buffers.items())
    assert int(whole.buffers["1.num_batches_tracked"]) == 4


def test_labels_found() -> None:
    setting = problems.Setting(problems.NETWORKS["CNN"], 0, SMALL)
    assert int(setting.wrong.sum()) == 4
    told = torch.where(setting.wrong, 1.0, -1.0)
    assert (setting.found(told), setting.found(-told), setting.found(torch.zeros(20))) == (1.0, 0.0, 0.5)


def test_words_of_a_table() -> None:
    assert tables.spread([1.0, 3.0, 2.0]) == "2 (1 to 3)"
    assert tables.spread([2.0, 2.0]) == "2"
    assert tables.statuses(["NOT_CONVERGED", "CONVERGED", "NOT_CONVERGED"]) == "2 not converged, 1 converged"
    assert tables.statuses(["CONVERGED"]) == "converged"


def test_quick_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run, "NETWORKS", {"CNN": problems.NETWORKS["CNN"]})
    monkeypatch.setattr(run, "QUICK", replace(SMALL, steps=4))
    figures = tmp_path / "figures.json"
    assert run.main(["--quick", "--json", str(figures)]) == 0
    found = json.loads(figures.read_text(encoding="utf-8"))
    assert "A quick run, not for reading" in capsys.readouterr().out
    assert found["networks"]["CNN"].keys() == FIGURES["networks"]["CNN"].keys()
    quick, kept = found["networks"]["CNN"]["seeds"][0], FIGURES["networks"]["CNN"]["seeds"][0]
    assert quick.keys() == kept.keys()
    assert quick["terms"][0]["kinds"].keys() == set(problems.KINDS)


def test_page_shows_the_kept_figures() -> None:
    assert run.main(["--from", str(KEPT), "--docs", str(PAGE), "--check"]) == 0
    assert not FIGURES["quick"]
    assert FIGURES["networks"].keys() == set(problems.NETWORKS)
    assert all(len(found["seeds"]) == run.SEEDS for found in FIGURES["networks"].values())
    assert all(
        len(seed["terms"]) == len(measure.FRACTIONS) for f in FIGURES["networks"].values() for seed in f["seeds"]
    )
