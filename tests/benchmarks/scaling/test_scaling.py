"""The page on scaling: its tables are the kept figures, its model is arithmetic done by hand here."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.communication.model import Sizes
from benchmarks.scaling import assumptions
from benchmarks.scaling import model as scaling_model
from benchmarks.scaling import run as scaling
from benchmarks.scaling.model import Machine, Schedule, Seconds
from bilevel.products.hvp import ReverseOverReverse
from recipes.vision.networks.backbones import build_backbone
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
    assumed = FIGURES["assumptions"]
    again = scaling_model.everything(assumed, scaling.GPUS)
    for name, rows in again.items():
        assert len(rows) == len(FIGURES[name])
        for row, kept in zip(rows, FIGURES[name], strict=True):
            assert {k: v for k, v in row.items() if isinstance(v, float)} == pytest.approx(
                {k: v for k, v in kept.items() if isinstance(v, float)}
            )
            assert [v for v in row.values() if isinstance(v, str)] == [v for v in kept.values() if isinstance(v, str)]
    assert assumed["machine"]["product_cost"] == FIGURES["products"]["rebuilt"]["median"]


TINY = Sizes(
    ranks=1,
    batch=8,
    labelled=4,
    embedding=2,
    classes=3,
    backbone=90,
    heads=9,
    head=5,
    backbone_norms=(),
    head_norms=(),
)
PLAIN = Machine(rate=8.0, bandwidth=4.0, latency=0.0, product_cost=3.0, flops=math.inf)
"""A gradient over the batch of 8 takes a second; 4 bytes, one number, a second are sent."""


def test_one_gpu_by_hand() -> None:
    assert scaling_model.gradient(TINY, PLAIN) == Seconds(compute=1.0)
    assert scaling_model.product(TINY, PLAIN, 5) == Seconds(compute=15.0)
    # 4 labelled images, one view each at two points.
    assert scaling_model.upper(TINY, PLAIN) == Seconds(compute=0.5)
    schedule = Schedule(alternations=10, pretext_steps=60, warm_up_steps=50)
    # 20 gradients, 3 products with 5 batches, 8 upper steps, a third of a gradient for each of the 5 batches.
    found = scaling_model.alternation(schedule, TINY, PLAIN, 3, 5)
    assert found.compute == pytest.approx(20 + 3 * 15 + 8 * 0.5 + 5 / 3)
    assert scaling_model.alternation(schedule, TINY, PLAIN, 0, 5) == Seconds(compute=24.0)
    published, *_, none = scaling_model.predict(schedule, TINY, PLAIN, {"default": 3, "two_batches": 2}, [1])
    stage = 10 * (20 + 40 * 15 + 4 + 5 / 3)
    assert published["stage_hours"] == pytest.approx(stage / 3600)
    assert published["baseline_hours"] == pytest.approx(60 / 3600)
    assert published["total_hours"] == pytest.approx((50 + stage) / 3600)
    assert published["stage_over_plain"] == pytest.approx(stage / 200)
    assert none["stage_over_plain"] == pytest.approx(24 / 20)
    assert published["baseline_limit"] == published["stage_limit"] == "compute"


def test_two_gpus_by_hand() -> None:
    """Of two, a GPU sends as many bytes as are summed, and half of those gathered; votes and counts have 8 bytes."""
    two = replace(TINY, ranks=2)
    found = scaling_model.gradient(two, PLAIN)
    assert found.compute == 0.5
    # The gradient of 99 numbers with the loss.
    assert found.reduction == 100.0
    # 16 numbers of embeddings gathered and summed, the ranks' counts of rows (16 bytes) gathered, a vote of 8 bytes.
    assert found.contrastive == 16 / 2 + 16 + 2 + 2
    product = scaling_model.product(two, PLAIN, 5)
    assert product.compute == 7.5
    assert product.reduction == 90.0
    # Each batch: embeddings gathered and summed twice, counts of rows once.
    assert product.contrastive == 5 * (2 * (16 / 2 + 16) + 2)
    assert scaling_model.upper(two, PLAIN).reduction == 1 + 2 * 90 + 5


def test_latency_and_statistics_by_hand() -> None:
    """One BatchNorm of 4 channels in two views: its count, means and sums of squares of both ranks, 18 numbers, are
    gathered and summed."""
    machine = replace(PLAIN, latency=1000.0)
    sizes = replace(TINY, ranks=2, backbone_norms=(4,))
    found = scaling_model.gradient(sizes, machine)
    assert found.statistics == 2 * (2 * 1000 + 18 / 2 + 18)
    assert found.reduction == 1000 + 100
    assert found.contrastive == 4 * 1000 + 28
    assert found.limit == "statistics"


def test_every_gpu_computes_the_whole_loss() -> None:
    """16 rows of 1 number: 3 times 16 x 16 products of 2 operations; of four GPUs each has a quarter in its rate."""
    machine = replace(PLAIN, bandwidth=math.inf, flops=96.0, rate=1.0)
    assert scaling_model.repeated_loss(replace(TINY, ranks=4), machine) == 0.75 * 3 * 2 * 256 / 96
    assert scaling_model.repeated_loss(TINY, machine) == 0.0
    assert scaling_model.gradient(replace(TINY, ranks=4), machine).limit == "contrastive"


def test_loading_runs_beside() -> None:
    machine = replace(PLAIN, cores=2.0, loading=1.0, augmentation=0.25)
    found = scaling_model.gradient(TINY, machine)
    assert found == Seconds(compute=1.0, augmentation=0.25, loading=4.0)
    assert (found.busy, found.total, found.limit) == (1.25, 4.0, "loading")
    faster = scaling_model.gradient(TINY, replace(machine, loading=4.0))
    assert (faster.busy, faster.total, faster.limit) == (1.25, 1.25, "compute")
    # 8 images in 1.25 seconds, one a second and core.
    row, device = scaling_model.loading(Schedule(), TINY, machine, {"slow": 1.0, "device": math.inf}, [1])
    assert (row["cores"], row["limit"]) == (6.4, "loading")
    assert row["hours"] == pytest.approx(58_800 * 4 / 3600)
    assert (device["cores"], device["limit"]) == (0.0, "compute")


def test_memory_by_hand() -> None:
    machine = replace(PLAIN, vectors=10.0, step_bytes=100.0, product_bytes=300.0)
    assert scaling_model.held(TINY, machine, products=1) == 4 * 10 * 99 + 8 * 300
    assert scaling_model.held(replace(TINY, ranks=2), machine, products=1) == 4 * 10 * 99 + 4 * 300
    assert scaling_model.held(TINY, machine, products=0) == 4 * 8 * 99 + 8 * 100
    counted = {"default": 1, "two_batches": 1}
    small = replace(machine, memory=6000.0)
    limits = [row["stage_limit"] for row in scaling_model.predict(Schedule(), TINY, small, counted, [1])]
    assert limits == ["memory"] * 4 + ["compute"]


def test_fine_tuning_by_hand() -> None:
    """12 images in three batches of 4; an epoch is half a gradient's time an image, validation a sixth."""
    schedule = Schedule(fine_tuning_epochs=10)
    assert scaling_model.fine_tuning(schedule, TINY, PLAIN, 12) == Seconds(compute=10 * 0.75)
    found = scaling_model.fine_tuning(schedule, replace(TINY, ranks=2), PLAIN, 12)
    assert (found.compute, found.reduction) == (10 * 0.375, 10 * 3 * 96)
    assert scaling_model.validation(schedule, TINY, PLAIN, 24).compute == pytest.approx(10 * 0.5)


def test_counts_of_a_small_network() -> None:
    """More memory for a product than for a gradient, and operations of both views, three passes each."""
    found = assumptions.count(quick=True)
    assert 0.0 < found["step_bytes"] < found["product_bytes"]
    network = build_backbone("resnet-tiny")
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, 32, 32))
    # The first layer needs no gradient by its input; heads and loss add to it.
    assert found["flops"] == pytest.approx(6 * counter.get_total_flops(), rel=0.2)


def test_assumptions_are_those_of_the_kept_figures() -> None:
    given = assumptions.gather(FIGURES["counted"], 4.0, cores=3.0)
    assert given["machine"]["cores"] == 3.0
    assert given["machine"]["loading"] == given["ways"][assumptions.USED]
    figures = {
        "setup": {"hessian_batches": 5},
        "overhead": {"default": {"hvps": [8, 7]}, "two_batches": {"hvps": [3, 2]}},
    }
    assert assumptions.products_of_an_alternation(figures) == {"default": 1.5, "two_batches": 1.25}
    assert given["products"] == assumptions.products_of_an_alternation(assumptions.kept("alternation"))
    assert 0.0 < given["machine"]["augmentation"] < 1.0


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


@pytest.mark.parametrize(
    "option", [["--check"], ["--recount"], ["--rate", "0"], ["--cores", "-1"], ["--memory", "inf"]]
)
def test_bad_options(option: list[str]) -> None:
    with pytest.raises(SystemExit):
        scaling.main(option)
