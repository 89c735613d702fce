import json
import math
import os
import platform
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from recipes.bissl.outcome.summary import ArmResult, assemble
from recipes.experiment.command.environment import environment

BISSL = [81.2, 80.4, 82.9, 81.0]
BASELINE = [79.9, 80.6, 81.1, 80.2]
SCRATCH = [60.3, 59.1, 62.2, 61.7]
TOP5 = [95.0, 96.0, 95.5, 96.5]
DIRECTIONS = {"top1": True, "top5": True, "loss": False}


def arm(top1: list[float], **other: list[float]) -> ArmResult:
    return ArmResult({"top1": top1, **other}, pretext_steps=1000, label_steps=40, seconds=12.5)


def result(arms: dict[str, ArmResult], **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "preset": "demo",
        "seeds": [0, 1, 2, 3],
        "repeats": "pipeline",
        "primary_metric": "top1",
        "environment": {"torch": "2.11"},
        "higher_is_better": DIRECTIONS,
    }
    content = assemble(arms=arms, **{**options, **changes})
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    return content


def test_solves_are_counted_by_arm_and_seed() -> None:
    solves = {0: {"CONVERGED": 30, "NOT_CONVERGED": 2}, 1: {"BUDGET": 31, "DIVERGED": 1}, 2: {"CONVERGED": 32}}
    bilevel = ArmResult({"top1": BISSL}, pretext_steps=1000, label_steps=40, seconds=12.5, solves=solves)
    content = result({"bissl": bilevel, "baseline": arm(BASELINE)})
    assert content["solver"] == {
        "bissl": {
            "solves": 96,
            "failures": {"NOT_CONVERGED": 2, "DIVERGED": 1},
            "per_seed": [
                {"seed": 0, "solves": 32, "failures": {"NOT_CONVERGED": 2}},
                {"seed": 1, "solves": 32, "failures": {"DIVERGED": 1}},
                {"seed": 2, "solves": 32, "failures": {}},
            ],
        }
    }


def test_every_key_of_the_schema() -> None:
    content = result({"bissl": arm(BISSL), "baseline": arm(BASELINE, top5=TOP5)})
    assert list(content) == [
        "preset",
        "seeds",
        "repeats",
        "primary_metric",
        "variants",
        "comparisons",
        "solver",
        "environment",
    ]
    assert content["solver"] == {}
    assert content["preset"] == "demo"
    assert content["seeds"] == [0, 1, 2, 3]
    assert content["repeats"] == "pipeline"
    assert content["primary_metric"] == "top1"
    assert content["environment"] == {"torch": "2.11"}
    assert set(content["variants"]) == {"bissl", "baseline"}
    assert set(content["variants"]["bissl"]) == {"top1", "pretext_steps", "label_steps", "seconds"}
    assert content["variants"]["baseline"] == {
        "top1": {
            "mean": pytest.approx(np.mean(BASELINE)),
            "std": pytest.approx(np.std(BASELINE, ddof=1)),
            "per_seed": BASELINE,
            "higher_is_better": True,
        },
        "top5": {
            "mean": pytest.approx(95.75),
            "std": pytest.approx(np.std(TOP5, ddof=1)),
            "per_seed": TOP5,
            "higher_is_better": True,
        },
        "pretext_steps": 1000,
        "label_steps": 40,
        "seconds": 12.5,
    }
    expected: Any = stats.ttest_rel(BISSL, BASELINE)
    interval = expected.confidence_interval(0.95)
    assert content["comparisons"] == [
        {
            "a": "bissl",
            "b": "baseline",
            "metric": "top1",
            "difference": pytest.approx(np.mean(BISSL) - np.mean(BASELINE)),
            "ci95": pytest.approx([interval.low, interval.high]),
            "test": "paired t",
            "p_value": pytest.approx(expected.pvalue),
            "p_holm": pytest.approx(expected.pvalue),
        }
    ]


def test_repeated_fine_tuning_is_tested_by_welch_and_says_what_it_measures() -> None:
    content = result({"bissl": arm(BISSL), "baseline": arm(BASELINE)}, repeats="finetune")
    (entry,) = content["comparisons"]
    assert entry["test"] == "welch (fine-tuning noise only)"
    expected: Any = stats.ttest_ind(BISSL, BASELINE, equal_var=False)
    assert entry["p_value"] == pytest.approx(expected.pvalue)


def test_pairs_with_scratch_and_holm() -> None:
    content = result({"scratch": arm(SCRATCH), "baseline": arm(BASELINE), "bissl": arm(BISSL)})
    table = content["comparisons"]
    assert [(entry["a"], entry["b"]) for entry in table] == [
        ("bissl", "baseline"),
        ("bissl", "scratch"),
        ("baseline", "scratch"),
    ]
    pairs = [(BISSL, BASELINE), (BISSL, SCRATCH), (BASELINE, SCRATCH)]
    raw = [stats.ttest_rel(a, b)[1] for a, b in pairs]
    assert [entry["p_value"] for entry in table] == pytest.approx(raw)
    # bissl against baseline has the largest p-value of the three, so it is the one that is not multiplied.
    low, high = sorted(raw[1:])
    adjusted = [3 * low, max(3 * low, 2 * high)]
    expected = [max(adjusted[1], raw[0]), *(adjusted if raw[1] == low else adjusted[::-1])]
    assert raw[0] == max(raw)
    assert [entry["p_holm"] for entry in table] == pytest.approx(expected)


def test_controls_are_compared_with_bissl_and_with_scratch() -> None:
    names = ["identity", "scratch", "restart", "baseline", "bissl"]
    content = result({name: arm([x + i for x in BISSL[::-1]] if i else BISSL) for i, name in enumerate(names)})
    assert [(entry["a"], entry["b"]) for entry in content["comparisons"]] == [
        ("bissl", "baseline"),
        ("bissl", "identity"),
        ("bissl", "restart"),
        ("bissl", "scratch"),
        ("baseline", "scratch"),
        ("identity", "scratch"),
        ("restart", "scratch"),
    ]


def test_every_shared_metric_is_compared_the_primary_one_first() -> None:
    loss = [0.5, 0.6, 0.4, 0.7]
    a = ArmResult({"loss": loss, "top5": TOP5, "top1": BISSL}, 1, 1, 1.0)
    content = result({"bissl": a, "baseline": arm(BASELINE, loss=loss[::-1])})
    assert [entry["metric"] for entry in content["comparisons"]] == ["top1", "loss"]
    assert content["variants"]["bissl"]["loss"]["higher_is_better"] is False
    # Each metric is a family of its own: one comparison, nothing to correct.
    assert all(entry["p_holm"] == entry["p_value"] for entry in content["comparisons"])


def test_one_seed_has_no_spread_and_no_test() -> None:
    content = result({"bissl": arm([81.0]), "baseline": arm([80.0])}, seeds=[7])
    assert content["variants"]["bissl"]["top1"]["std"] is None
    (entry,) = content["comparisons"]
    assert entry["difference"] == 1.0
    assert (entry["ci95"], entry["p_value"], entry["p_holm"]) == (None, None, None)
    assert "one pair" in entry["test"]


def test_missing_seeds_cannot_be_paired() -> None:
    content = result({"bissl": arm(BISSL[:3]), "baseline": arm(BASELINE)})
    (entry,) = content["comparisons"]
    assert entry["difference"] == pytest.approx(np.mean(BISSL[:3]) - np.mean(BASELINE))
    assert (entry["ci95"], entry["p_value"], entry["p_holm"]) == (None, None, None)
    assert entry["test"] == "none (values cannot be paired: 3 and 4 for 4 seeds)"


def test_a_value_that_is_not_finite_becomes_null_and_is_named() -> None:
    content = result({"bissl": arm([81.0, math.nan, math.inf, 80.0]), "baseline": arm(BASELINE)})
    summary = content["variants"]["bissl"]["top1"]
    assert summary["per_seed"] == [81.0, None, None, 80.0]
    assert (summary["mean"], summary["std"]) == (None, None)
    (entry,) = content["comparisons"]
    assert (entry["difference"], entry["ci95"], entry["p_value"]) == (None, None, None)
    assert "not finite" in entry["test"]


@pytest.mark.parametrize(
    ("arms", "changes", "message"),
    [
        ({"bissl": arm(BISSL)}, {}, "lacks baseline"),
        ({"bissl": arm(BISSL), "baseline": arm(BASELINE)}, {"repeats": "both"}, "repeats"),
        ({"bissl": arm(BISSL), "baseline": arm(BASELINE)}, {"primary_metric": "map11"}, "primary metric 'map11'"),
        ({"bissl": arm(BISSL), "baseline": arm(BASELINE)}, {"seeds": [0, 1]}, "4 values of 'top1' for 2 seeds"),
        ({"bissl": arm(BISSL), "baseline": arm(BASELINE, speed=TOP5)}, {}, "'speed'"),
        ({"bissl": arm(BISSL), "baseline": arm(BASELINE, seconds=TOP5)}, {}, "'seconds'"),
        ({"bissl": arm(BISSL), "baseline": arm([])}, {}, "0 values"),
    ],
)
def test_refusals(arms: dict[str, ArmResult], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        result(arms, **changes)


def test_environment_says_what_ran_and_not_where() -> None:
    content = environment("cpu", ["torchvision"])
    assert content["python"] == platform.python_version()
    assert content["torch"] == torch.__version__
    assert content["torchvision"] == version("torchvision")
    assert content["device"] == "cpu"
    assert content["cuda"] is None
    assert content["cpu_count"] == os.cpu_count()
    assert content["threads"] == torch.get_num_threads()
    assert content["processes"] == 1
    assert content["device_name"]
    text = json.dumps(content, allow_nan=False)
    assert platform.node() not in text
    assert os.getcwd() not in text
