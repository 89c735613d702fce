"""The tables of the page."""

import math
from collections.abc import Mapping
from typing import Any

from benchmarks.pages import conditions, table

Figures = Mapping[str, Any]

NAMES = {
    "where the tasks disagree": "flatness",
    "how far they disagree": "disagreement",
    "condition of H": "condition",
    "labels": "labels",
    "noise of a label": "noise",
    "lambda": "lambda",
    "damping": "damping",
    "gamma": "gamma",
    "rows of H in A": "rows",
    "lower steps": "lower-steps",
    "alternations": "alternations",
    "inputs of the downstream task": "inputs",
}
"""Dial -> its name in the markers of the page."""


def saved(gain: Figures) -> str:
    """By how much the risk differs from that of x = v, with the 95% interval: below 0 is better."""
    low, middle, high = (100.0 * math.expm1(-gain["mean"] + side * gain["error"]) for side in (-1.0, 0.0, 1.0))
    return f"{middle:+.0f}% [{low:+.0f}, {high:+.0f}]"


def tables(figures: Figures) -> dict[str, str]:
    """By name of the marker."""
    (first, _), *others = NAMES.items()
    texts = {"worth-flatness": f"{_first(figures['sweeps'][first]['dial'])}\n\n{conditions(figures)}"}
    texts["worth-matched"] = _matched(figures["matched"])
    texts["worth-dials"] = _dials({dial: figures["sweeps"][dial] for dial, _ in others})
    return texts | {"worth-cosine": _by_cosine(figures), "worth-rules": _rules(figures)}


def _first(rows: list[Figures]) -> str:
    header = ["flatness", "cos(x, v)", "start", "fine-tuning", "x = v", "`CG(1)`", "`CG(3)`", "solve"]
    body = [
        [
            *(row["value"], f"{row['cosine']:.2f}", f"{row['start']:.3f}"),
            *(f"{row['risk'][arm]:.3f}" for arm in ("fine-tuning", "identity")),
            *(saved(row["gain"][arm]) for arm in ("CG(1)", "CG(3)", "solve")),
        ]
        for row in rows
    ]
    return table(header, body)


def _matched(by_power: Figures) -> str:
    body = [
        [
            f"{power}: {names}",
            *(f"{row['risk'][arm]:.4f}" for arm in ("fine-tuning", "identity", "solve")),
            *(saved(row["gain"][arm]) for arm in ("fine-tuning", "solve")),
        ]
        for (power, row), names in zip(by_power.items(), ("fine-tuning's", "that of x = v", "the solve's"), strict=True)
    ]
    header = [
        "disagreement spread as (1 + h/λ)^-p",
        "fine-tuning",
        "x = v",
        "solve",
        "fine-tuning beside x = v",
        "solve beside x = v",
    ]
    return table(header, body)


def _dials(sweeps: Figures) -> str:
    header = ["dial", "value", "cos(x, v)", "flatness 0: `CG(3)`", "solve", "flatness 2: `CG(3)`", "solve"]
    body = []
    for dial, by_flatness in sweeps.items():
        alike, flat = by_flatness["0"], by_flatness["2"]
        for index, (a, b) in enumerate(zip(alike, flat, strict=True)):
            cells = [saved(row["gain"][arm]) for row in (a, b) for arm in ("CG(3)", "solve")]
            body.append([dial if index == 0 else "", a["value"], f"{b['cosine']:.2f}", *cells])
    return table(header, body)


def _by_cosine(figures: Figures) -> str:
    body = []
    for row in figures["by_cosine"]:
        low, middle, high = (f"{100.0 * math.expm1(-gain):+.0f}%" for gain in reversed(row["quantiles"]))
        counts = [row["worth"], row["settings"] - row["worth"] - row["harmful"], row["harmful"]]
        name = f"below {row['high']:g}" if row["low"] < 0 else f"{row['low']:g} to {min(row['high'], 1.0):g}"
        body.append([name, str(row["settings"]), *map(str, counts), middle, f"{low} to {high}"])
    header = ["cos(x, v)", "settings", "solve better", "no difference", "worse", "median", "5% to 95% of settings"]
    return table(header, body)


def _rules(figures: Figures) -> str:
    body = [
        [
            each["rule"],
            f"{100 * each['hits']['mean']:.0f} ± {100 * each['hits']['error']:.0f}",
            f"{100 * each['balanced']['mean']:.0f} ± {100 * each['balanced']['error']:.0f}",
            f"{100 * each['solves']['mean']:.0f}",
            f"{100 * each['loss']['mean']:.1f} ± {100 * each['loss']['error']:.1f}",
        ]
        for each in figures["rules"]
    ]
    return table(["solve where", "right (%)", "balanced (%)", "solves (%)", "ln risk lost (x 100)"], body)
