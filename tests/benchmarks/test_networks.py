"""The page on hyperparameters of a network: its reference by differences, its tables, the sentences that hold."""

import json
import statistics
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
    assert tables.counts([101, 100]) == "100.5 (100 to 101)"
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


def kept(network: str, *path: str | int) -> list[Any]:
    """What stands under the path, for every seed."""
    found = FIGURES["networks"][network]["seeds"]
    for key in path:
        found = [value[key] for value in found]
    return found


def term(network: str, fraction: float) -> list[Any]:
    return kept(network, "terms", measure.FRACTIONS.index(fraction))


def cosines(rows: list[Any], kind: str) -> list[float]:
    return [row["kinds"][kind]["cosine"] for row in rows]


def middle(rows: list[Any], kind: str, what: str = "cosine") -> float:
    return statistics.median(row["kinds"][kind][what] for row in rows)


def ended(rows: list[Any]) -> set[str]:
    return {row["status"] for row in rows}


class TestSentences:
    def test_reference(self) -> None:
        for kind in problems.KINDS:
            for row in kept("ViT of timm", "reference", kind):
                assert row["measured"] == pytest.approx(row["length"], rel=0.11)
        signs = {row[kind]["measured"] > 0 for row in FIGURES["networks"]["CNN"]["whole"] for kind in problems.KINDS}
        assert signs == {True, False}

    @pytest.mark.parametrize(("network", "first"), [("CNN", 1e-3), ("ViT of timm", 1e-2)])
    def test_terms(self, network: str, first: float) -> None:
        assert ended(term(network, 0.0)) == {"NEGATIVE_CURVATURE"}
        for fraction in measure.FRACTIONS:
            assert (ended(term(network, fraction)) == {"CONVERGED"}) == (fraction >= first)
        smallest, tenfold = term(network, first), term(network, 10 * first)
        assert middle(tenfold, "weights") < 0.75 * middle(smallest, "weights")
        assert statistics.median(r["products"] for r in tenfold) < 0.5 * min(r["products"] for r in smallest)
        assert middle(term(network, 0.1), "log_decay", "ratio") <= 0.03

    def test_suggestion(self) -> None:
        name = "CG(n, 1e-2), the suggested term"
        assert ended(kept("CNN", "solvers", name)) == {"CONVERGED"}
        assert ended(kept("ViT of timm", "solvers", name)) == {"NEGATIVE_CURVATURE"}

    @pytest.mark.parametrize("network", problems.NETWORKS)
    def test_solvers(self, network: str) -> None:
        cg, ten = (kept(network, "solvers", name) for name in ("CG(n, 1e-2)", "CG(10, None)"))
        newton, little = (kept(network, "solvers", f"CG(n, 1e-2) with GaussNewton(){t}") for t in ("", ", term / 10"))
        assert ended(cg) == ended(newton) == ended(little) == {"CONVERGED"}
        assert middle(newton, "weights") == pytest.approx(middle(cg, "weights"), abs=0.02)
        assert middle(little, "weights") > middle(cg, "weights") + 0.1
        assert middle(ten, "weights") == pytest.approx(middle(cg, "weights"), abs=0.02)
        neumann = kept(network, "solvers", "Neumann(n, 1e-2)")
        assert ended(neumann) == {"NOT_CONVERGED"}
        assert middle(neumann, "weights") < middle(cg, "weights")
        assert ended(kept(network, "solvers", "MINRES(n, 1e-2), no term")) == {"NOT_CONVERGED"}
        assert all(row["warm"] < row["cold"] for row in kept(network, "warm"))

    def test_identity(self) -> None:
        assert max(cosines(kept("CNN", "solvers", "Identity()"), "log_decay")) < -0.5

    def test_lower_steps(self) -> None:
        signs = [[c > 0 for c in cosines(kept("CNN", "steps", i), "log_decay")] for i in range(4)]
        assert signs == [[False] * 3, [False] * 3, [True] * 3, [True] * 3]
        for i in range(3):
            assert ended(kept("ViT of timm", "steps", i)) == {"NEGATIVE_CURVATURE"}
        for network in problems.NETWORKS:
            early, late = (statistics.median(r["found"] for r in kept(network, "steps", i)) for i in (1, 3))
            assert early > 0.85 > late

    def test_training(self) -> None:
        rows = FIGURES["networks"]["CNN"]["training"]
        names = {row["method"] for row in rows}
        test = {name: statistics.median(r["test"] for r in rows if r["method"] == name) for name in names}
        assert max(test, key=lambda name: test[name]) == "the start"
        assert max((n for n in test if n != "the start"), key=lambda name: test[name]) == "Identity()"
        assert min(test, key=lambda name: test[name]) == "CG(100, 1e-2), the term"
        failed = [row for row in rows if row["method"] == "CG(100, 1e-2), no term"]
        assert all(row["statuses"].keys() == {"NEGATIVE_CURVATURE"} for row in failed)
        start = {row["seed"]: row for row in rows if row["method"] == "the start"}
        for row in failed:
            assert row["test"] < start[row["seed"]]["test"]
            assert row["found"] > 0.85
