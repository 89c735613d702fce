"""The final table and the comparisons of `results.json`, for the console and as plain text."""

import math
from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from ...experiment.terminal import printable

NOT_RECORDED = "not recorded"

FINETUNE_NOISE = (
    "Only fine-tuning was repeated, from one pre-trained backbone an arm: intervals and p-values measure fine-tuning "
    "noise alone, not how much the pre-training stages vary."
)
PIPELINE_NOISE = "The whole pipeline was repeated: seeds are paired between the arms, and all stages contribute."


def results_table(results: Mapping[str, Any]) -> Table:
    """The table printed at the end of a run, one row an arm.

    Its columns are the metrics (mean ± standard deviation over seeds), pretext steps, labelled steps and seconds.

    Args:
        results: the content of `results.json`; accuracies are in percent. Missing entries show as "not recorded".
    """
    metrics = metric_names(results)
    seeds = results.get("seeds") or []
    table = Table(title=_text(f"preset {results.get('preset', NOT_RECORDED)}, {len(seeds)} seed(s)"))
    table.add_column("arm", no_wrap=True)
    for metric in metrics:
        table.add_column(_text(f"{metric} {metric_direction(results, metric)}".strip()), justify="right")
    for title in ("pretext steps", "label steps", "seconds"):
        table.add_column(title, justify="right")
    for arm, entry in arms_in_order(results).items():
        scores = [mean_and_std(entry.get(metric)) for metric in metrics]
        costs = [count_text(entry.get("pretext_steps")), count_text(entry.get("label_steps"))]
        table.add_row(*(_text(cell) for cell in (arm, *scores, *costs, seconds_text(entry.get("seconds")))))
    return table


def _text(cell: str) -> Text:
    """A cell as it is: neither markup nor commands for the terminal."""
    return Text(printable(cell))


def comparison_lines(results: Mapping[str, Any]) -> list[str]:
    """One sentence a comparison, then what the repetitions measure. Plain text: print it with `markup=False`."""
    lines = []
    for comparison in results.get("comparisons") or []:
        first, second = comparison.get("a", NOT_RECORDED), comparison.get("b", NOT_RECORDED)
        difference, interval = comparison_numbers(comparison)
        parts = [f"{first} − {second}, {comparison.get('metric', NOT_RECORDED)}: {difference}"]
        parts.append(f"95% interval {interval}")
        if comparison.get("test"):
            parts.append(str(comparison["test"]))
        parts.append(f"p {p_text(comparison.get('p_value'))}")
        if comparison.get("p_holm") is not None:
            parts.append(f"after Holm's correction p {p_text(comparison['p_holm'])}")
        lines.append("; ".join(parts))
    if lines and (sentence := repeats_sentence(results)):
        lines.append(sentence)
    return lines


def repeats_sentence(results: Mapping[str, Any]) -> str:
    """What the spread over seeds measures; empty where the results do not say what was repeated."""
    return {"finetune": FINETUNE_NOISE, "pipeline": PIPELINE_NOISE}.get(str(results.get("repeats")), "")


def arms_in_order(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Arms as `results.json` lists them, `bissl` and `baseline` first."""
    arms = results.get("arms") or {}
    first = [arm for arm in ("bissl", "baseline") if arm in arms]
    return {arm: arms[arm] for arm in [*first, *(arm for arm in arms if arm not in first)]}


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


def _signed(value: Any) -> str:
    text = number_text(value)
    return f"+{text}" if isinstance(value, int | float) and value > 0 else text.replace("-", "−", 1)
