"""The evidence benchmark's arithmetic against simulation and hand computation; its configuration is what it says."""

import json
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks import evidence
from benchmarks.pages import insert
from recipes.bissl.commands.parsing import parse
from recipes.bissl.settings.arms import ARMS
from tests.support.paths import ROOT

KEPT = ROOT / "benchmarks" / "results" / "evidence.json"
PAGE = ROOT / "docs" / "results.md"


@pytest.mark.parametrize("pairs", [5, 6, 10])
def test_the_smallest_effect_is_found_four_times_in_five(pairs: int) -> None:
    generator = np.random.default_rng(0)
    effect = evidence.smallest_effect(pairs, 2.0)
    differences = generator.normal(effect, 2.0, size=(40_000, pairs))
    t = differences.mean(axis=1) / (differences.std(axis=1, ddof=1) / np.sqrt(pairs))
    p = 2.0 * stats.t.sf(np.abs(t), pairs - 1)
    # The sum of two quantiles is the usual approximation to the noncentral t; it is off by a few points for few pairs.
    assert np.mean(p < 0.05) == pytest.approx(0.8, abs=0.05)


def made(scores: dict[str, list[float]]) -> dict[str, Any]:
    arms = {
        arm: {
            "top1": {"mean": float(np.mean(v)), "std": float(np.std(v, ddof=1)), "per_seed": v},
            **{"pretext_steps": 8, "label_steps": 4, "seconds": 1.0},
        }
        for arm, v in scores.items()
    }
    return {"primary_metric": "top1", "variants": arms, "seeds": [0, 1, 2, 3]}


def test_comparisons_are_paired_and_corrected_as_one_family() -> None:
    generator = np.random.default_rng(1)
    names = {name for pair in evidence.FAMILY for name in pair}
    scores = {name: generator.normal(50.0, 2.0, size=4).tolist() for name in sorted(names)}
    found = evidence.analyse(made(scores), [])["comparisons"]
    raw = [stats.ttest_rel(scores[a], scores[b]).pvalue for a, b in evidence.FAMILY]
    assert [c["p_value"] for c in found] == pytest.approx(raw)
    assert [c["p_holm"] for c in found] == pytest.approx(_holm(raw))
    for (a, b), row in zip(evidence.FAMILY, found, strict=True):
        difference = np.array(scores[a]) - np.array(scores[b])
        interval = stats.t.interval(0.95, 3, difference.mean(), stats.sem(difference))
        assert row["ci95"] == pytest.approx(interval)
        assert row["spread"] == pytest.approx(difference.std(ddof=1))


def _holm(p: list[float]) -> list[float]:
    order, worst, adjusted = np.argsort(p), 0.0, [0.0] * len(p)
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = worst
    return adjusted


def test_solves_are_summarised_by_arm_and_alternation() -> None:
    common = {"stage": "bissl", "event": "upper", "num_hvps": 3, "relative_change": 0.2}
    rows = [
        {**common, "variant": "a", "seed": s, "step": 4 * t, "alternation": t, "cosine": c, "status": k}
        for s, t, c, k in [(0, 1, 0.9, "CONVERGED"), (0, 2, 0.8, "BUDGET"), (1, 1, 0.7, "BUDGET")]
    ]
    unsolved = {**common, "variant": "a", "seed": 0, "step": 1, "alternation": 1, "status": None, "cosine": None}
    found = evidence.solves([*rows, unsolved])["a"]
    assert found["solves"] == 3
    assert found["cosine"] == {"min": 0.7, "median": 0.8, "max": 0.9}
    assert found["cosine_by_alternation"] == pytest.approx([0.8, 0.8])
    assert found["statuses"] == {"BUDGET": 2, "CONVERGED": 1}


def test_the_configuration_has_the_arms_that_are_compared() -> None:
    config = parse(["--config", str(evidence.CONFIG), "--data.pretext=folder:x", "--data.downstream=folder:x"]).config
    assert {name for pair in evidence.FAMILY for name in pair} == set(config.arms)
    assert set(config.arms) <= ARMS.keys() | config.variants.keys()
    assert config.bissl.damping == 10.0
    assert config.for_arm("bissl-low-damping").bissl.damping < config.bissl.damping
    assert config.for_arm("identity").bissl.solver == "identity"
    assert (config.pipeline_seeds or 0) >= 5


@pytest.mark.skipif(not KEPT.exists(), reason="not measured yet")
def test_the_page_shows_the_kept_figures() -> None:
    figures = json.loads(KEPT.read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    assert insert(page, evidence.tables(figures)) == page
    steps = {row["pretext_steps"] for arm, row in figures["arms"].items() if arm != "scratch"}
    assert len(steps) == 1
    assert len(figures["seeds"]) >= 5
