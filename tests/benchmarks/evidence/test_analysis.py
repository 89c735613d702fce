"""The evidence benchmark's arithmetic against hand computation; the page shows the figures that are kept."""

import json
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.evidence import analysis
from benchmarks.evidence.rounds import FIRST, ROUNDS, Round
from benchmarks.pages import insert
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "results.md"


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
    names = {name for pair in FIRST.family for name in pair}
    scores = {name: generator.normal(50.0, 2.0, size=4).tolist() for name in sorted(names)}
    found = analysis.analyse(FIRST, made(scores), [])["comparisons"]
    raw = [stats.ttest_rel(scores[a], scores[b]).pvalue for a, b in FIRST.family]
    assert [c["p_value"] for c in found] == pytest.approx(raw)
    assert [c["p_holm"] for c in found] == pytest.approx(_holm(raw))
    for (a, b), row in zip(FIRST.family, found, strict=True):
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
    found = analysis.solves([*rows, unsolved])["a"]
    assert found["solves"] == 3
    assert found["cosine"] == {"min": 0.7, "median": 0.8, "max": 0.9}
    assert found["cosine_by_alternation"] == pytest.approx([0.8, 0.8])
    assert found["statuses"] == {"BUDGET": 2, "CONVERGED": 1}


@pytest.mark.parametrize("each", ROUNDS.values(), ids=ROUNDS)
def test_the_page_shows_the_kept_figures(each: Round) -> None:
    page = PAGE.read_text(encoding="utf-8")
    figures = json.loads(each.figures.read_text(encoding="utf-8")) if each.figures.exists() else None
    assert insert(page, analysis.tables(each, figures)) == page
    if figures is not None:
        steps = {row["pretext_steps"] for arm, row in figures["arms"].items() if arm != "scratch"}
        assert len(steps) == 1
        assert figures["seeds"] == list(range(each.seeds))


@pytest.mark.parametrize("each", ROUNDS.values(), ids=ROUNDS)
def test_the_page_states_what_the_design_can_detect(each: Round) -> None:
    page = PAGE.read_text(encoding="utf-8")
    if each.search is not None:
        assert insert(page, {f"evidence-{each.name}-design": analysis.design_table(each)}) == page
