"""The measurements: sweeps around one setting, and rules fitted on random settings and tried on others."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from benchmarks.disagreement.model import ARMS, Setting, direction_of, draw, train
from benchmarks.disagreement.rules import TRIALS, Advice, Measured, Rule, fit, score, signs_of
from benchmarks.disagreement.settings import BASE, CURVES, SWEEPS, random_settings, sweep

Figures = dict[str, Any]

FLATNESSES = (0.0, 2.0)
"""Disagreement everywhere alike, and where the pretext loss is flat: both at every other dial."""

FITTED = ("cosine", "relative change", "c", "stationarity", "agreement")
"""Signs whose threshold is fitted; trials and agreement also stand at 0."""

COSINES = (-1.0, 0.8, 0.95, 0.99, 1.01)
"""Bounds of the classes of cos(x, v)."""


def gains(risks: dict[str, torch.Tensor], arm: str) -> Figures:
    """ln(risk with x = v) - ln(risk of the arm): mean over seeds and 1.96 standard errors."""
    gain = risks["identity"].log() - risks[arm].log()
    return {"mean": float(gain.mean()), "error": float(1.96 * gain.std() / math.sqrt(len(gain)))}


def compare(setting: Setting, seeds: int, arms: Sequence[str] = ARMS) -> Figures:
    """Mean risks and gains of the arms, and cos(x, v) at the start."""
    draws = draw(setting, seeds)
    risks = {arm: train(draws, arm).risk for arm in arms}
    v = draws.gradient(draws.a)
    x = direction_of("solve", draws.system(0))(v)
    return {
        "cosine": float(cosine_similarity(x, v).mean()),
        "start": float(draws.risk(draws.a).mean()),
        "risk": {arm: float(risk.mean()) for arm, risk in risks.items()},
        "gain": {arm: gains(risks, arm) for arm in arms if arm != "identity"},
    }


def sweeps(seeds: int) -> Figures:
    """Every dial by itself; the first for several lambda, as curves."""
    tables: Figures = {}
    for dial in SWEEPS:
        own = dial == next(iter(SWEEPS))
        for flatness in FLATNESSES[:1] if own else FLATNESSES:
            rows = [{"value": label, **compare(setting, seeds)} for label, setting in sweep(dial, flatness)]
            tables.setdefault(dial, {})["dial" if own else f"{flatness:g}"] = rows
    return tables


def matched(seeds: int) -> Figures:
    """Disagreements that are spread as each of three arms takes for granted, under all of them."""
    settings = {f"{power:g}": replace(BASE, matched=True, flatness=power) for power in (0.0, 1.0, 2.0)}
    return {power: compare(setting, seeds) for power, setting in settings.items()}


def curves(seeds: int) -> Figures:
    """The gain of the solve against where the tasks disagree, by lambda."""
    flatnesses = np.linspace(-1.0, 2.0, 13).tolist()
    found: Figures = {"flatness": flatnesses, "lambda": {}}
    for proximity in CURVES:
        rows = []
        for flatness in flatnesses:
            setting = replace(BASE, flatness=flatness, proximity=proximity)
            rows.append(compare(setting, seeds, ("identity", "solve"))["gain"]["solve"])
        found["lambda"][f"{proximity:g}"] = rows
    return found


def measured(setting: Setting, seeds: int, first: int) -> Measured:
    draws = draw(setting, seeds, first)
    gain = train(draws, "identity").risk.log() - train(draws, "solve").risk.log()
    return Measured(setting, gain.numpy(), {name: values.numpy() for name, values in signs_of(draws).items()})


def rules(count: int, seeds: int) -> Figures:
    """Thresholds from `count` random settings, and what the rules are worth on as many others."""
    # Settings and draws of the second half are none of the first.
    fitted = [measured(setting, seeds, 10_000) for setting in random_settings(count, 1)]
    held_out = [measured(setting, seeds, 20_000) for setting in random_settings(count, 2)]
    found: Figures = {"settings": count, "seeds": seeds, "kinds": _kinds(held_out), "rules": []}
    found["by_cosine"] = _by_cosine(fitted + held_out)
    candidates = [fit(sign, fitted) for sign in FITTED]
    candidates += [Rule(sign, above=True, threshold=0.0) for sign in ("agreement", *TRIALS)]
    for rule in candidates:
        found["rules"].append({"rule": rule.text(), **score(rule.says, held_out)})
    for name, advice in _constant().items():
        found["rules"].append({"rule": name, **score(advice, held_out)})
    return found


def _constant() -> dict[str, Advice]:
    return {
        "always solve": lambda each: np.ones(len(each.gain), dtype=np.bool_),
        "never solve": lambda each: np.zeros(len(each.gain), dtype=np.bool_),
    }


def _kinds(group: Sequence[Measured]) -> Figures:
    """How many settings a solve is worth it in, or harmful; the 5%, 50% and 95% quantiles of the gain."""
    means = np.array([each.gain.mean() for each in group])
    return {
        "settings": len(group),
        "worth": sum(each.worth for each in group),
        "harmful": sum(each.harmful for each in group),
        "quantiles": np.quantile(means, (0.05, 0.5, 0.95)).tolist(),
    }


def _by_cosine(group: Sequence[Measured]) -> list[Figures]:
    """The kinds of settings by cos(x, v), a mean over draws."""
    rows = []
    for low, high in pairwise(COSINES):
        inside = [each for each in group if low <= each.signs["cosine"].mean() < high]
        if inside:
            rows.append({"low": low, "high": high, **_kinds(inside)})
    return rows


def measure(*, quick: bool = False) -> Figures:
    """All figures of the study."""
    seeds, count, each = (4, 12, 4) if quick else (60, 150, 24)
    return {
        "seeds": seeds,
        "matched": matched(5 * seeds),
        "sweeps": sweeps(seeds),
        "curves": curves(seeds),
        **rules(count, each),
    }
