"""Which settings the study measures: sweeps of a dial around one setting, and settings drawn at random."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from numpy.random import Generator, default_rng

from benchmarks.disagreement.model import Setting

BASE = Setting(flatness=1.0, disagreement=1.0, labels=40, noise=0.3, proximity=0.1, condition=30.0)

SWEEPS: dict[str, tuple[tuple[str, Mapping[str, Any]], ...]] = {
    "where the tasks disagree": tuple((f"{f:g}", {"flatness": f}) for f in (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0)),
    "how far they disagree": tuple((f"{d:g}", {"disagreement": d}) for d in (0.1, 0.3, 1.0, 3.0)),
    "condition of H": tuple((f"{k:g}", {"condition": k}) for k in (3.0, 30.0, 300.0, 3000.0)),
    "labels": tuple((str(n), {"labels": n}) for n in (10, 40, 160, 640)),
    "noise of a label": tuple((f"{s:g}", {"noise": s}) for s in (0.03, 0.3, 1.0)),
    "lambda": tuple((f"{w:g}", {"proximity": w}) for w in (0.01, 0.1, 1.0, 10.0)),
    "damping": tuple((f"{w:g}", {"damping": w}) for w in (0.0, 0.1, 1.0, 10.0)),
    "gamma": tuple((f"{g:g}", {"gamma": g}) for g in (0.0, 0.01, 1.0)),
    "rows of H in A": tuple((str(r) if r else "all", {"hessian_rows": r}) for r in (None, 160, 40, 10)),
    "lower steps": tuple((str(n) if n else "solved", {"lower_steps": n}) for n in (None, 30, 10, 3)),
    "alternations": tuple((str(n), {"alternations": n}) for n in (10, 50, 250)),
    "inputs of the downstream task": (("the pretext's", {"shared": True}), ("white", {"shared": False})),
}
"""Dial -> values, each with the fields of `BASE` that it replaces."""

CURVES = (0.03, 0.1, 0.3, 1.0)
"""Values of lambda for which the picture follows the first dial."""


def sweep(dial: str, flatness: float) -> list[tuple[str, Setting]]:
    """The settings of a sweep; `flatness` where it is not the dial."""
    base = replace(BASE, flatness=flatness)
    return [(label, replace(base, **changes)) for label, changes in SWEEPS[dial]]


def random_settings(count: int, seed: int) -> list[Setting]:
    """Settings whose dials are drawn independently: lengths and numbers evenly in their logarithm."""
    generator = default_rng(seed)
    return [_random(generator) for _ in range(count)]


def _random(generator: Generator) -> Setting:
    def log(low: float, high: float) -> float:
        return float(low * (high / low) ** generator.random())

    return Setting(
        condition=log(3.0, 3000.0),
        disagreement=log(0.1, 3.0),
        flatness=float(generator.uniform(-1.0, 2.0)),
        labels=round(log(10.0, 640.0)),
        noise=log(0.03, 1.0),
        proximity=log(0.01, 10.0),
        damping=log(0.1, 10.0) if generator.random() < 0.5 else 0.0,
        gamma=float(generator.choice([0.0, 0.01, 1.0])),
        hessian_rows=[None, 320, 80, 20][int(generator.integers(4))],
        lower_steps=[None, 30, 10, 3][int(generator.integers(4))],
        alternations=round(log(10.0, 100.0)),
        shared=bool(generator.integers(2)),
    )
