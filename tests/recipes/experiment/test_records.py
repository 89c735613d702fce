"""Curves and bands taken from recorded events."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from recipes.experiment.records import Curve, bands, curves, mean_curve, order_events, select, thin


def test_resumed_steps_count_once() -> None:
    head = {"stage": "bissl", "variant": "bissl", "seed": 0, "event": "upper"}
    rows = [head | {"step": k, "alternation": k // 4, "residual": 10.0 ** -(k % 4 + 1)} for k in range(8)]
    again = [row | {"residual": 0.5} for row in rows[4:]]
    upper = select(rows + again, "bissl", "upper")
    assert len(upper) == 8
    band = bands(upper, "residual", x="alternation")["bissl"]
    np.testing.assert_allclose(band.mean, [(0.1 + 0.01 + 0.001 + 0.0001) / 4, 0.5])
    np.testing.assert_allclose(band.low, [0.0001, 0.5])
    np.testing.assert_allclose(band.high, [0.1, 0.5])


def test_band_skips_nulls_and_keeps_gaps() -> None:
    head = {"stage": "bissl", "variant": "a", "seed": 0, "event": "upper"}
    rows = [head | {"step": k, "alternation": k // 2, "residual": r} for k, r in enumerate([1.0, None, None, None])]
    band = bands(rows, "residual", x="alternation")["a"]
    np.testing.assert_array_equal(band.x, [0, 1])
    np.testing.assert_array_equal(band.mean, [1.0, math.nan])


def test_mean_over_seeds_covers_their_common_steps() -> None:
    long, short = Curve(np.arange(4.0), np.array([1.0, 2, 3, 4])), Curve(np.array([1.0, 2]), np.array([4.0, 9]))
    mean = mean_curve({0: long, 1: short})
    np.testing.assert_array_equal(mean.x, [1, 2])
    np.testing.assert_array_equal(mean.y, [3, 6])


def test_curves_sort_steps_and_turn_null_into_nan() -> None:
    head = {"stage": "s", "variant": "a", "seed": 3, "event": "e"}
    rows = [head | {"step": 2, "loss": 5.0}, head | {"step": 1, "loss": None}, head | {"step": 3, "lr": 1.0}]
    curve = curves(rows, "loss")["a"][3]
    np.testing.assert_array_equal(curve.x, [1, 2])
    np.testing.assert_array_equal(curve.y, [math.nan, 5.0])


def test_thinned_curve_keeps_extremes_and_order() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=50_001)
    values[12_345], values[40_000] = 99.0, -99.0
    values[100:120] = math.nan
    curve = thin(Curve(np.arange(50_001.0), values))
    assert curve.x.size <= 2000
    assert (np.diff(curve.x) > 0).all()
    assert np.nanmax(curve.y) == 99.0
    assert np.nanmin(curve.y) == -99.0
    np.testing.assert_array_equal(values[curve.x.astype(int)], curve.y)


def test_short_curve_stays_as_it_is() -> None:
    curve = Curve(np.arange(2000.0), np.zeros(2000))
    assert thin(curve) is curve


def event(stage: str, seed: int, step: int) -> dict[str, object]:
    return {"stage": stage, "variant": "a", "seed": seed, "event": "e", "step": step}


def test_events_are_put_in_the_order_of_their_stages_and_keep_it_within_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    # The steps of a stage stand as they were written, also where one was made again.
    mixed = [event("b", 0, 1), event("a", 1, 2), event("a", 0, 9), event("b", 0, 0), event("a", 1, 1)]
    ordered = [mixed[2], mixed[1], mixed[4], mixed[0], mixed[3]]
    text = "".join(json.dumps(line) + "\n" for line in mixed)
    path.write_text(text + '{"stage": "a", "var')
    order_events(path, lambda line: (line["stage"], line["seed"]))
    assert [json.loads(line) for line in path.read_text().splitlines()] == ordered
    before = path.stat().st_ino
    order_events(path, lambda line: (line["stage"], line["seed"]))
    # What is in order is not written again.
    assert path.stat().st_ino == before


def test_a_broken_line_is_named_instead_of_ordered(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(event("b", 0, 1)) + "\n[]\n")
    with pytest.raises(ValueError, match="line 2: holds a list"):
        order_events(path, lambda line: line["stage"])
