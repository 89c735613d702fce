"""Metrics of torchmetrics beside the recipe's own: values of whole sets, NaN, refusals, and several processes."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score
from torchmetrics.wrappers.abstract import WrapperMetric

from recipes.experiment.plugins import PluginError
from recipes.vision import shards
from recipes.vision.metrics import Metric, evaluate, top_k
from recipes.vision.shards import evaluated_rows, on_shards
from recipes.vision.torch_metrics import as_metrics
from tests.support.rank_processes import on_ranks

CLASSES, COUNT = 4, 23


class Rows(torchmetrics.Metric):
    """How many rows there were: what is counted twice shows."""

    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.rows += len(outputs)

    def compute(self) -> Tensor:
        return self.rows


def whole_set() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(COUNT, CLASSES, generator=generator)
    return scores, torch.randint(CLASSES, (COUNT,), generator=generator)


def batches() -> list[tuple[Tensor, Tensor]]:
    scores, targets = whole_set()
    return list(zip(scores.split(5), targets.split(5), strict=True))


class Half(WrapperMetric):
    """Half of another metric, held inside: its states are not this one's."""

    higher_is_better = True

    def __init__(self, inner: torchmetrics.Metric) -> None:
        super().__init__()
        self.inner = inner

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.inner.update(outputs, targets)

    def compute(self) -> Tensor:
        return self.inner.compute() / 2

    def reset(self) -> None:
        super().reset()
        self.inner.reset()


def metrics() -> dict[str, Metric]:
    accuracy = MulticlassAccuracy(CLASSES, average="micro")
    return as_metrics({"f1": MulticlassF1Score(CLASSES), "half": Half(accuracy), "rows": Rows(), "top1": top_k(1)})


def check(values: dict[str, float]) -> None:
    scores, targets = whole_set()
    assert values["f1"] == pytest.approx(float(MulticlassF1Score(CLASSES)(scores, targets)))
    assert values["rows"] == COUNT
    # torchmetrics counts in shares of 1, the recipe in percent.
    assert values["half"] == pytest.approx(values["top1"] / 200)


def test_values_are_of_the_whole_set_each_time_anew() -> None:
    found = metrics()
    for _ in range(2):
        check(evaluate(lambda x: x, batches(), found))


def test_a_metric_of_the_recipe_stays_as_it_is() -> None:
    own = top_k(1)
    assert as_metrics({"top1": own}) == {"top1": own}


def test_the_better_side_is_the_metrics_own() -> None:
    found = as_metrics({"error": torchmetrics.MeanSquaredError(), "r2": torchmetrics.R2Score()})
    assert [metric.higher_is_better for metric in found.values()] == [False, True]


def test_what_a_metric_has_seen_before_does_not_count() -> None:
    given = Rows()
    given.update(*whole_set())
    assert evaluate(lambda x: x, batches(), as_metrics({"rows": given})) == {"rows": COUNT}


def test_a_nan_among_the_outputs_makes_the_value_nan() -> None:
    scores, targets = whole_set()
    scores[7, int(targets[7])] = math.nan
    outputs = iter(scores.split(5))
    accuracy = MulticlassAccuracy(CLASSES, average="micro")
    # torchmetrics takes the NaN for the highest score: a right answer.
    assert accuracy(scores[7:8], targets[7:8]) == 1.0
    values = evaluate(lambda x: next(outputs), batches(), as_metrics({"accuracy": accuracy, "top1": top_k(1)}))
    assert math.isnan(values["accuracy"])
    assert 0 <= values["top1"] < 100


REFUSED: dict[str, tuple[Any, str]] = {
    "no direction": (MulticlassConfusionMatrix(CLASSES), "which does not say whether higher values are better"),
    "a composition": (Rows() + 1, "a CompositionalMetric, which does not say whether higher values are better"),
    "a collection": (
        torchmetrics.MetricCollection([Rows()]),
        "neither a bilevel.recipes.vision.metrics.Metric nor a torchm",
    ),
    "a function": (lambda outputs, targets: 0.0, "'x' is a function, neither a bilevel.recipes"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_refused(case: str) -> None:
    given, message = REFUSED[case]
    with pytest.raises(PluginError, match=r"metrics: 'x' is a ") as refused:
        as_metrics({"x": given})
    assert message in str(refused.value)


def test_no_metric_is_refused() -> None:
    with pytest.raises(PluginError, match="return at least one"):
        as_metrics({})


def test_a_value_of_several_numbers_is_refused() -> None:
    found = as_metrics({"x": MulticlassAccuracy(CLASSES, average=None)})
    with pytest.raises(PluginError, match="metrics: 'x' is a MulticlassAccuracy, whose value is not a single number"):
        evaluate(lambda x: x, batches(), found)


def test_without_torchmetrics_the_message_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    assert as_metrics({"top1": top_k(1)})
    with pytest.raises(PluginError, match="torchmetrics is not installed"):
        as_metrics({"x": 3})


def found_here() -> dict[str, float]:
    def outputs(scores: Tensor) -> Tensor:
        return on_shards(lambda rows: rows, shards.Rows(scores[evaluated_rows(len(scores))], len(scores)))

    return evaluate(outputs, batches(), metrics())


def test_several_processes_see_every_row_once(tmp_path: Path) -> None:
    alone = found_here()
    check(alone)
    for ranks in on_ranks(found_here, tmp_path).values():
        assert ranks == [alone] * len(ranks)
