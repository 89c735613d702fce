"""The page on scaling: its tables are the kept figures, its model is arithmetic done by hand here."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.scaling import model as scaling_model
from benchmarks.scaling import run as scaling
from benchmarks.scaling.model import Machine, Schedule
from bilevel.products.hvp import ReverseOverReverse
from tests.support.paths import ROOT

KEPT = ROOT / "benchmarks/results/scaling.json"
PAGE = ROOT / "docs/scaling.md"
FIGURES: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8"))


def test_page_shows_the_kept_figures() -> None:
    assert scaling.main(["--from", str(KEPT), "--docs", str(PAGE), "--check"]) == 0
    assert not FIGURES["quick"]


def test_another_figure_is_noticed(tmp_path: Path) -> None:
    page, figures = tmp_path / "page.md", tmp_path / "figures.json"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    figures.write_text(
        json.dumps(FIGURES | {"products": {k: v | {"median": 9.0} for k, v in FIGURES["products"].items()}})
    )
    assert scaling.main(["--from", str(figures), "--docs", str(page), "--check"]) == 1
    assert scaling.main(["--from", str(figures), "--docs", str(page)]) == 0
    assert scaling.main(["--from", str(figures), "--docs", str(page), "--check"]) == 0


def test_kept_prediction_is_the_model_s() -> None:
    given = FIGURES["assumptions"]
    again = scaling_model.predict(Schedule(**given["schedule"]), Machine(**given["machine"]), scaling.GPUS)
    for row, kept in zip(again, FIGURES["prediction"], strict=True):
        assert row == pytest.approx(kept)
    assert given["machine"]["product_cost"] == FIGURES["products"]["rebuilt"]["median"]


def test_one_gpu_by_hand() -> None:
    """Rate 1024 images a second, so that a lower gradient takes a second and an upper one's passes a quarter."""
    machine, schedule = Machine(rate=1024.0, bandwidth=1e9, product_cost=3.0), Schedule()
    assert scaling_model.gradient_seconds(schedule, machine, 1) == 1.0
    assert scaling_model.alternation_seconds(schedule, machine, 1, 40) == 20 + 40 * 5 * 3 + 8 * 0.25
    published, *_, none = (row for row in scaling_model.predict(schedule, machine, [1]))
    assert published["stage_hours"] == pytest.approx(500 * 622 / 3600)
    assert published["baseline_hours"] == pytest.approx(58_800 / 3600)
    assert published["total_hours"] == pytest.approx((49_000 + 500 * 622) / 3600)
    assert published["stage_over_plain"] == pytest.approx(622 / 20)
    assert none["stage_over_plain"] == pytest.approx(22 / 20)


def test_several_gpus_by_hand() -> None:
    """A ring all-reduce sends 2 (n - 1) / n times the bytes; the rest is shared."""
    machine = Machine(rate=1.0, bandwidth=4.0, product_cost=2.0)
    schedule = replace(Schedule(), batch_size=8, parameters=100, embedding=1)
    assert scaling_model.reduction_seconds(machine, 6.0, 3) == 8.0
    assert scaling_model.reduction_seconds(machine, 6.0, 1) == 0.0
    assert scaling_model.gradient_seconds(schedule, machine, 2) == 8 / 2 + (100 + 16)
    assert scaling_model.product_seconds(schedule, machine, 2) == 5 * (2 * 8 / 2 + 32) + 100


def test_fit_finds_the_exponent() -> None:
    x = [1.0, 2.0, 4.0, 8.0, 16.0]
    found = scaling.fit(x, [3.0 * value**1.5 for value in x])
    assert found["exponent"] == pytest.approx(1.5)
    assert found["high"] - found["low"] < 1e-6
    assert scaling.fit(x, [7.0] * 5) == pytest.approx({"exponent": 0.0, "low": 0.0, "high": 0.0}, abs=1e-9)
    rough = scaling.fit(x, [value * math.exp(0.1 * (-1) ** index) for index, value in enumerate(x)])
    assert rough["low"] < 1.0 < rough["high"]


def test_a_step_makes_its_products() -> None:
    size = scaling.Size(width=1, batch_size=2, hessian_batches=2, upper_steps=1, iterations=2, pixels=8)
    step = scaling.Step(size, torch.device("cpu"))
    assert step.parameters == sum(value.numel() for value in step.lower.values())
    before = {name: value.clone() for name, value in step.lower.items()}
    step(ReverseOverReverse())
    assert all(torch.equal(before[name], value) for name, value in step.lower.items())


def test_kept_exponents_are_those_of_the_kept_times() -> None:
    found = scaling.fits(FIGURES["sizes"])
    for row, kept in zip(found, FIGURES["fits"], strict=True):
        assert row["time"]["exponent"] == pytest.approx(kept["time"]["exponent"])
        assert row["memory"]["low"] <= row["memory"]["exponent"] <= row["memory"]["high"]
    assert all(len(row) == len(scaling.FIT_HEADER) for row in scaling.fit_rows(FIGURES))
    assert all(len(row) == len(scaling.PREDICTION_HEADER) for row in scaling.prediction_rows(FIGURES))


@pytest.mark.parametrize("option", [["--check"], ["--rate", "0"]])
def test_bad_options(option: list[str]) -> None:
    with pytest.raises(SystemExit):
        scaling.main(option)
