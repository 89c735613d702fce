"""Makes `results.json`: the scores and costs of every arm, and tests of the differences between arms."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

from bilevel import Status

from ...experiment.statistics import Comparison, holm, mean_std, paired, welch
from ..settings.arms import METHOD, REQUIRED, SCRATCH, in_order

Repeats = Literal["finetune", "pipeline"]

_SKIPPED = ("skipped_pretext_steps", "skipped_label_steps")
_COUNTS = ("pretext_steps", "label_steps", "seconds", *_SKIPPED)


@dataclass(frozen=True)
class ArmResult:
    """What one arm of an experiment achieved, and what it cost.

    Attributes:
        metrics: By name, one value per seed in the order of the run's seeds; rates are in percent.
        pretext_steps: Updates on the pretext loss in one repeat, lower-level steps included.
        label_steps: Updates that saw labels in one repeat, upper-level steps included.
        seconds: Wall-clock seconds of the arm.
        solves: By seed of the bilevel stage, how many of its linear solves ended with which `Status`, by name; empty
            for an arm without that stage.
        skipped_pretext_steps, skipped_label_steps: How many of the steps were left out, as their loss or gradient was
            not finite; the most of any repeat.
    """

    metrics: Mapping[str, Sequence[float]]
    pretext_steps: int
    label_steps: int
    seconds: float
    solves: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    skipped_pretext_steps: int = 0
    skipped_label_steps: int = 0


def assemble(
    preset: str,
    seeds: Sequence[int],
    repeats: Repeats,
    primary_metric: str,
    arms: Mapping[str, ArmResult],
    environment: Mapping[str, Any],
    *,
    higher_is_better: Mapping[str, bool],
) -> dict[str, Any]:
    """The content of `results.json`, ready for ``json.dumps(..., allow_nan=False)``.

    Compared are "bissl" with every other arm, "baseline" first, and each remaining arm with "scratch" where there is
    one; each pair in every metric that both arms have, the primary metric first. The test is the paired t-test when the
    whole pipeline was repeated, and Welch's when only fine-tuning was, in which case it measures fine-tuning noise
    alone and says so. ``p_holm`` is the p-value after Holm's correction over the comparisons in the same metric. What
    is undefined is None: the spread and the test of a single seed, and whatever a value that is not finite enters.
    Skipped steps stand in an arm's entry where there are any. "solver" counts, for each arm that solved linear systems,
    the solves and by status those that failed.

    Args:
        preset: Name of the configuration.
        seeds: The seeds of the repeats.
        repeats: What each seed repeats: only fine-tuning, or the whole pipeline.
        primary_metric: The metric that decides; every arm has it.
        arms: By name; "bissl" and "baseline" are required.
        environment: What `environment` returned.
        higher_is_better: For every metric of every arm.

    Raises:
        ValueError: A required arm or metric is missing, a metric has no direction, the name of a count or more values
            than there are seeds, or `repeats` is unknown.
    """
    _check(seeds, repeats, primary_metric, arms, higher_is_better)
    return {
        "preset": preset,
        "seeds": list(seeds),
        "repeats": repeats,
        "primary_metric": primary_metric,
        "variants": {name: _arm(arm, higher_is_better) for name, arm in arms.items()},
        "comparisons": _comparisons(repeats, len(seeds), primary_metric, arms),
        "solver": {name: _solver(arm.solves) for name, arm in arms.items() if arm.solves},
        "environment": dict(environment),
    }


def _check(
    seeds: Sequence[int],
    repeats: str,
    primary_metric: str,
    arms: Mapping[str, ArmResult],
    higher_is_better: Mapping[str, bool],
) -> None:
    if repeats not in ("finetune", "pipeline"):
        raise ValueError(f'repeats must be "finetune" or "pipeline", got {repeats!r}')
    missing = [name for name in REQUIRED if name not in arms]
    if missing:
        raise ValueError(f"arms lacks {', '.join(missing)}; got {', '.join(arms) or 'no arm'}")
    for name, arm in arms.items():
        if primary_metric not in arm.metrics:
            raise ValueError(
                f"arm {name!r} lacks the primary metric {primary_metric!r}; it has {', '.join(arm.metrics)}"
            )
        for metric, values in arm.metrics.items():
            if metric in _COUNTS or metric not in higher_is_better:
                raise ValueError(f"metric {metric!r} needs an entry in higher_is_better and a name that is no count's")
            if not 1 <= len(values) <= len(seeds):
                raise ValueError(f"arm {name!r} has {len(values)} values of {metric!r} for {len(seeds)} seeds")


def _arm(arm: ArmResult, higher_is_better: Mapping[str, bool]) -> dict[str, Any]:
    metrics = {name: _summary(values, higher_is_better[name]) for name, values in arm.metrics.items()}
    counts = {"pretext_steps": arm.pretext_steps, "label_steps": arm.label_steps, "seconds": arm.seconds}
    skipped = {name: count for name in _SKIPPED if (count := getattr(arm, name))}
    return {**metrics, **counts, **skipped}


def _solver(solves: Mapping[int, Mapping[str, int]]) -> dict[str, Any]:
    """Numbers of solves and of failures, of the arm and of each seed."""
    total = sum((Counter(counts) for counts in solves.values()), Counter())
    per_seed = [{"seed": seed, **_failures(counts)} for seed, counts in solves.items()]
    return {**_failures(total), "per_seed": per_seed}


def _failures(counts: Mapping[str, int]) -> dict[str, Any]:
    failed = {name: count for name, count in counts.items() if not Status[name].ok}
    return {"solves": sum(counts.values()), "failures": failed}


def _summary(values: Sequence[float], higher_is_better: bool) -> dict[str, Any]:
    mean, std = mean_std(values) if _finite(values) else (None, None)
    per_seed = [float(value) if math.isfinite(value) else None for value in values]
    return {"mean": mean, "std": std, "per_seed": per_seed, "higher_is_better": higher_is_better}


def _comparisons(repeats: Repeats, seeds: int, primary: str, arms: Mapping[str, ArmResult]) -> list[dict[str, Any]]:
    """One entry per metric and pair of arms, those of the primary metric first."""
    others = dict.fromkeys(metric for arm in arms.values() for metric in arm.metrics if metric != primary)
    table = []
    for metric in (primary, *others):
        pairs = [pair for pair in _pairs(arms) if all(metric in arms[name].metrics for name in pair)]
        found = [_compare(arms[a].metrics[metric], arms[b].metrics[metric], repeats, seeds) for a, b in pairs]
        corrected = holm([comparison.p_value if comparison else None for comparison in found])
        for (a, b), comparison, p_holm in zip(pairs, found, corrected, strict=True):
            table.append({"a": a, "b": b, "metric": metric, **_entry(comparison), "p_holm": p_holm})
    return table


def _pairs(arms: Mapping[str, ArmResult]) -> list[tuple[str, str]]:
    """The method against every other arm, then the others against scratch."""
    order = sorted(in_order(arms), key=lambda name: name == SCRATCH)
    return [(a, b) for a, b in combinations(order, 2) if a == METHOD or b == SCRATCH]


def _compare(a: Sequence[float], b: Sequence[float], repeats: Repeats, seeds: int) -> Comparison | None:
    """The test that the kind of repeats allows; None where a value is not finite."""
    if not (_finite(a) and _finite(b)):
        return None
    if repeats == "finetune":
        result = welch(a, b)
        return Comparison(result.difference, result.ci95, f"{result.test} (fine-tuning noise only)", result.p_value)
    if len(a) == len(b) == seeds:
        return paired(a, b)
    difference = mean_std(a)[0] - mean_std(b)[0]
    reason = f"none (values cannot be paired: {len(a)} and {len(b)} for {seeds} seeds)"
    return Comparison(difference, None, reason, None)


def _entry(comparison: Comparison | None) -> dict[str, Any]:
    if comparison is None:
        return {"difference": None, "ci95": None, "test": "none (a value is not finite)", "p_value": None}
    interval = None if comparison.ci95 is None else list(comparison.ci95)
    return {
        "difference": comparison.difference,
        "ci95": interval,
        "test": comparison.test,
        "p_value": comparison.p_value,
    }


def _finite(values: Sequence[float]) -> bool:
    return all(math.isfinite(value) for value in values)
