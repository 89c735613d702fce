"""A run's results for the terminal: a table of the arms, and a line for each comparison."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from ...experiment.records import NOT_RECORDED
from ...experiment.terminal import printable
from .wording import (
    arms_in_order,
    comparison_numbers,
    mean_and_std,
    metric_direction,
    metric_names,
    p_text,
    repeats_sentence,
    seconds_text,
    steps_text,
)


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
        costs = [steps_text(entry, "pretext_steps"), steps_text(entry, "label_steps")]
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


def plain_lines(results: Mapping[str, Any]) -> list[str]:
    """The primary metric (a percentage) and the steps of each arm, then the first comparison; for a plain terminal."""
    metric, (first, *_) = results["primary_metric"], results["comparisons"]
    lines = [f"{'arm':<12}{'test ' + metric:<20}{'pretext steps':>14}{'label steps':>14}"]
    for name, arm in results["variants"].items():
        score = f"{arm[metric]['mean']:.1f}% +- {arm[metric]['std']:.1f}"
        lines.append(f"{name:<12}{score:<20}{arm['pretext_steps']:>14}{arm['label_steps']:>14}")
    found = f"{first['difference']:+.1f}, p = {first['p_value']:.2f}, {first['test']}"
    return [*lines, f"{first['a']} less {first['b']}: {found}; {len(results['seeds'])} seeds"]
