"""The alternation benchmark in small: its figures mean what they say."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import cost_page
from benchmarks.alternation import run as alternation
from benchmarks.alternation.setup import QUICK, make_setup
from benchmarks.pages import insert
from bilevel import CG
from tests.support.paths import ROOT

KEPT = ROOT / "benchmarks" / "results" / "alternation.json"


def test_the_figures_of_a_small_alternation(monkeypatch: pytest.MonkeyPatch) -> None:
    # At the quick run's damping the benchmark's own tolerance asks for no iteration at all.
    tight = replace(alternation.SETTINGS["global_cg"], solver=CG(10, 4e-3, memory=6))
    monkeypatch.setitem(alternation.SETTINGS, "global_cg", tight)
    setup = make_setup("photographs", torch.device("cpu"), QUICK)
    assert (len(setup.lower_batches), len(setup.upper_batches)) == (2 * 4, 2 * 2)
    found = alternation.measure(setup, 1, ["global_cg", "default", "identity"], quick=True)
    separate, default, identity = (found["overhead"][name] for name in ("global_cg", "default", "identity"))
    assert identity["hvps"] == [0, 0]
    assert all(count > 0 for count in default["hvps"])
    # The first alternation, and those after it where one solve an alternation remembers what came before.
    assert [len(row["error"]) for row in (separate, default, identity)] == [1, 2, 1]
    # Identity's error is the part of the update that the solve is for.
    assert separate["error"][0] < 0.5 * identity["error"][0]
    assert identity["error"][0] == pytest.approx(separate["relative_change"], rel=0.5)
    assert separate["solve_error"] < 0.5 * identity["error"][0]
    assert all(error < 1.5 * floor for error, floor in zip(default["error"], found["noise_floor"], strict=True))
    assert all(0.0 < floor < 1.0 for floor in found["noise_floor"])
    # Without gamma, momentum and norm limit aggregation changes nothing but rounding and the solver's 1e-5.
    assert found["aggregation"][0]["gamma"] == found["aggregation"][0]["momentum"] == 0.0
    assert found["aggregation"][0]["bias"] < 1e-3
    assert default["ratio"] > 0.0
    assert default["peak_memory_mib"] > found["plain"]["peak_memory_mib"] > 0.0


@pytest.mark.skipif(not KEPT.exists(), reason="not measured yet")
def test_the_kept_figures_meet_what_the_documentation_says() -> None:
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    overhead, floors = kept["overhead"], kept["noise_floor"]
    assert overhead["global_cg"]["error"][0] <= overhead["paper"]["error"][0]
    solves = {name: row["ratio"] - overhead["identity"]["ratio"] for name, row in overhead.items()}
    assert solves["global_cg"] <= solves["paper"] / 6.0
    assert overhead["default"]["ratio"] <= 2.4
    assert overhead["two_batches"]["ratio"] <= 1.7
    assert all(error <= floor for error, floor in zip(overhead["default"]["error"], floors, strict=True))
    assert overhead["paper"]["ratio"] > overhead["global_cg"]["ratio"] > overhead["default"]["ratio"]


def test_the_page_shows_the_kept_figures() -> None:
    page = cost_page.PAGE.read_text(encoding="utf-8")
    assert insert(page, cost_page.tables()) == page
    assert "quick run" not in page
