"""Scores, costs and differences of `results.json` in the words that console, report and tables show."""

import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from ...experiment.records import NOT_RECORDED
from ...vision.sources.foreign.options import split_options
from ..settings.arms import in_order

WITH_PATHS = ("folder", "hf", "webdataset")

FINETUNE_NOISE = (
    "Only fine-tuning was repeated, from one pre-trained backbone an arm: intervals and p-values measure fine-tuning "
    "noise alone, not how much the pre-training stages vary."
)
PIPELINE_NOISE = "The whole pipeline was repeated: seeds are paired between the arms, and all stages contribute."


def repeats_sentence(results: Mapping[str, Any]) -> str:
    """What the spread over seeds measures; empty where the results do not say what was repeated."""
    return {"finetune": FINETUNE_NOISE, "pipeline": PIPELINE_NOISE}.get(str(results.get("repeats")), "")


def arms_in_order(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The results of each arm, in the order in which arms are shown."""
    arms = results.get("variants") or {}
    return {arm: arms[arm] for arm in in_order(arms)}


def metric_names(results: Mapping[str, Any]) -> list[str]:
    """Names of the metrics of all arms, the primary one first."""
    primary = results.get("primary_metric")
    found = {
        key: None
        for entry in arms_in_order(results).values()
        for key, value in entry.items()
        if isinstance(value, dict)
    }
    return sorted(found, key=lambda metric: metric != primary)


def metric_direction(results: Mapping[str, Any], metric: str) -> str:
    """An arrow to the better side; empty where no arm says which it is."""
    stated = [entry[metric].get("higher_is_better") for entry in arms_in_order(results).values() if metric in entry]
    better = next((value for value in stated if value is not None), None)
    return {True: "↑", False: "↓", None: ""}[better]


def mean_and_std(entry: Mapping[str, Any] | None) -> str:
    """`mean ± std` of a metric, the mean alone where one seed leaves no spread."""
    if entry is None:
        return NOT_RECORDED
    mean, std = number_text(entry.get("mean")), entry.get("std")
    return mean if std is None else f"{mean} ± {number_text(std)}"


def number_text(value: Any) -> str:
    """Two decimals, or three significant digits where these would hide the number."""
    if value is None:
        return NOT_RECORDED
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.3g}" if value != 0 and abs(value) < 0.1 else f"{value:.2f}"


def count_text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else number_text(value)


def steps_text(entry: Mapping[str, Any], name: str) -> str:
    """An arm's "pretext_steps" or "label_steps", by `name`, with how many of them were skipped where any were."""
    skipped = entry.get(f"skipped_{name}")
    return count_text(entry.get(name)) + (f" ({count_text(skipped)} skipped)" if skipped else "")


def seconds_text(value: Any) -> str:
    return f"{value:,.1f}" if isinstance(value, int | float) else number_text(value)


def p_text(value: Any) -> str:
    """`= 0.012`, `< 0.001`, or that there is none."""
    if value is None:
        return NOT_RECORDED
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def comparison_numbers(comparison: Mapping[str, Any]) -> tuple[str, str]:
    """The difference with its sign, and the interval `[low, high]`."""
    interval = comparison.get("ci95")
    bounds = NOT_RECORDED if interval is None else f"[{_signed(interval[0])}, {_signed(interval[1])}]"
    return _signed(comparison.get("difference")), bounds


def shown_name(source: str) -> str:
    """A data source's name for a picture: of a path, its last part."""
    kind, _, path = source.partition(":")
    return PurePath(split_options(path)[0]).name if kind in WITH_PATHS else source


def _signed(value: Any) -> str:
    text = number_text(value)
    return f"+{text}" if isinstance(value, int | float) and value > 0 else text.replace("-", "−", 1)
