"""The search for the upper level's learning rate of each arm, by whole pipelines on seeds of their own."""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.evidence.rounds import Round, Search
from recipes.bissl.settings.arms import METHOD, REQUIRED
from recipes.experiment.configuration import read_config_file
from recipes.experiment.records import Event, select


def candidate(arm: str, rate: float) -> str:
    """The name of the variant that is the arm at that rate."""
    return f"{arm}-at-{rate:g}"


def search_options(made: Round) -> list[str]:
    """Options of the run that tries every rate of every arm.

    The method itself is in every run, and so the first of its own candidates.
    """
    search = _search(made)
    variants = {}
    for arm in search.arms:
        for rate in search.rates[1:] if arm == METHOD else search.rates:
            variants[candidate(arm, rate)] = _fields(made, arm) | {"upper_lr": rate}
    first, count = search.seeds
    options = {"seed": first, "pipeline_seeds": count, "data.val_per_class": search.val_per_class}
    options |= {"bissl.upper_lr": search.rates[0]}
    lists = {"variants": variants, "arms": [*REQUIRED, *variants]}
    return [f"--{name}={value}" for name, value in options.items()] + [
        f"--{name}={json.dumps(value)}" for name, value in lists.items()
    ]


def chosen_options(made: Round, chosen: Mapping[str, float]) -> list[str]:
    """Options of the result's run: every arm at the rate that was chosen for it."""
    variants = {arm: _fields(made, arm) | {"upper_lr": rate} for arm, rate in chosen.items() if arm != METHOD}
    return [f"--bissl.upper_lr={chosen[METHOD]}", f"--variants={json.dumps(variants)}"]


def choose(made: Round, events: Sequence[Event]) -> dict[str, Any]:
    """Validation scores of every candidate, and of each arm the rate with the best mean; the lower one of equals.

    A pipeline's score is the top-1 of its best epoch on the validation images.
    """
    search = _search(made)
    best: dict[str, dict[int, float]] = {}
    for event in select(events, "finetune", "epoch"):
        scores = best.setdefault(event["variant"], {})
        scores[event["seed"]] = max(scores.get(event["seed"], 0.0), float(event["val_top1"]))
    arms = {}
    for arm in search.arms:
        per_seed = {}
        for rate in search.rates:
            own = arm == METHOD and rate == search.rates[0]
            scores = best[METHOD if own else candidate(arm, rate)]
            per_seed[f"{rate:g}"] = [scores[seed] for seed in sorted(scores)]
        means = {rate: statistics.mean(scores) for rate, scores in per_seed.items()}
        winner = max(search.rates, key=lambda rate: (means[f"{rate:g}"], -rate))
        arms[arm] = {"per_seed": per_seed, "mean": means, "chosen": winner}
    first, count = search.seeds
    return {"seeds": list(range(first, first + count)), "rates": list(search.rates), "arms": arms}


def _search(made: Round) -> Search:
    if made.search is None:
        raise ValueError(f"round {made.name!r} has its rates in its configuration and no search")
    return made.search


def _fields(made: Round, arm: str) -> dict[str, Any]:
    """The arm's own fields of the bilevel stage, as the configuration has them."""
    return dict(read_config_file(made.config)["variants"].get(arm, {}))
