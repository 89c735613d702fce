"""The controlled study: what a rule's advice is worth, and that the page shows the kept figures."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.disagreement import run
from benchmarks.disagreement.model import Setting, draw
from benchmarks.disagreement.rules import Measured, Rule, fit, score, signs_of
from benchmarks.disagreement.settings import SWEEPS, random_settings, sweep
from benchmarks.disagreement.study import compare
from benchmarks.disagreement.tables import saved, tables
from benchmarks.pages import insert
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "worth.md"


def outcome(gain: float, sign: list[float], spread: float = 0.001) -> Measured:
    """A setting with that mean gain, whose sign is as given in each of its four draws."""
    return Measured(Setting(), gain + spread * np.array([1.0, -1.0, 1.0, -1.0]), {"sign": np.array(sign)})


def test_worth_and_harm_need_both_size_and_certainty() -> None:
    assert outcome(0.1, [0.0] * 4).worth
    assert not outcome(0.01, [0.0] * 4).worth
    assert not outcome(0.1, [0.0] * 4, spread=1.0).worth
    assert outcome(-0.1, [0.0] * 4).harmful
    assert not outcome(-0.01, [0.0] * 4).harmful


def test_advice_is_scored_by_hits_and_by_what_it_loses() -> None:
    settings = [
        outcome(0.4, [1.0, 1.0, 1.0, -1.0]),
        outcome(0.2, [1.0, 1.0, 1.0, 1.0]),
        outcome(-0.3, [-1.0, -1.0, 1.0, 1.0]),
        outcome(-0.1, [-1.0, -1.0, -1.0, -1.0]),
    ]
    found = score(Rule("sign", above=True, threshold=0.0).says, settings)
    assert found["hits"]["mean"] == pytest.approx((0.75 + 1.0 + 0.5 + 1.0) / 4)
    assert found["balanced"]["mean"] == pytest.approx((0.875 + 0.75) / 2)
    assert found["solves"]["mean"] == pytest.approx((0.75 + 1.0 + 0.5 + 0.0) / 4)
    # A draw in four misses a gain of 0.4, and two in four take a loss of 0.3.
    assert found["loss"]["mean"] == pytest.approx((0.1 + 0.0 + 0.15 + 0.0) / 4)


def test_the_fitted_rule_separates_what_can_be_separated() -> None:
    rising = [outcome(0.2, [0.6, 0.7, 0.8, 0.9]), outcome(0.3, [0.8, 0.9, 0.7, 0.6])]
    falling = [outcome(-0.2, [0.1, 0.2, 0.3, 0.4]), outcome(0.0, [0.1, 0.2, 0.2, 0.1])]
    rule = fit("sign", rising + falling)
    assert rule.above
    assert 0.4 <= rule.threshold < 0.6
    assert score(rule.says, rising + falling)["hits"]["mean"] == 1.0


def test_signs_are_those_of_the_systems() -> None:
    near, far = (
        {name: values.mean().item() for name, values in signs_of(draw(Setting(proximity=p), 8)).items()}
        for p in (1000.0, 0.01)
    )
    assert near["cosine"] == pytest.approx(1.0, abs=1e-4)
    assert near["relative change"] == pytest.approx(0.0, abs=1e-2)
    assert far["cosine"] < 0.9
    assert far["stationarity"] == pytest.approx(0.0, abs=1e-9)
    few = signs_of(draw(Setting(proximity=0.01, lower_steps=3), 8))
    assert few["stationarity"].mean() > 0.05


def test_random_settings_are_reproducible_and_the_two_halves_differ() -> None:
    assert random_settings(5, 1) == random_settings(7, 1)[:5]
    assert not set(random_settings(20, 1)) & set(random_settings(20, 2))


def test_sweeps_move_one_dial() -> None:
    for dial in SWEEPS:
        settings = [setting for _, setting in sweep(dial, 0.5)]
        differing = {name for name in vars(settings[0]) if len({getattr(s, name) for s in settings}) > 1}
        assert len(differing) == 1, dial


def test_a_gain_is_shown_as_the_change_of_the_risk() -> None:
    assert saved({"mean": math.log(2.0), "error": 0.0}) == "-50% [-50, -50]"
    assert saved({"mean": -math.log(1.5), "error": math.log(1.5)}) == "+50% [+0, +125]"
    found = compare(Setting(), 6)
    assert found["gain"].keys() == found["risk"].keys() - {"identity"}


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.disagreement.study.SWEEPS", dict(list(SWEEPS.items())[:2]))
    monkeypatch.setattr("benchmarks.disagreement.study.CURVES", (0.3,))
    path, picture = tmp_path / "figures.json", tmp_path / "picture.svg"
    assert run.main(["--quick", "--json", str(path), "--figure", str(picture)]) == 0
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert figures["kinds"]["settings"] == figures["settings"]
    assert picture.read_text(encoding="utf-8").rstrip().endswith("</svg>")


def test_the_page_shows_the_kept_figures() -> None:
    kept = json.loads((ROOT / "benchmarks" / "results" / "disagreement.json").read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    assert insert(page, tables(kept)) == page
    assert set(re.findall(r"^<!-- table (\S+) -->$", page, re.M)) == set(tables(kept))
