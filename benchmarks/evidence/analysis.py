"""What finished runs of a round amount to: arms, paired comparisons, what the solves were like, and their tables."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.evidence.rounds import Round, smallest_effect
from benchmarks.pages import conditions, table
from recipes.experiment.records import Event, select
from recipes.experiment.statistics import holm, mean_std, paired

Figures = dict[str, Any]

NOT_RUN = "Not run yet."
"""Stands in the place of a round's tables until it has figures."""


def analyse(made: Round, results: Mapping[str, Any], events: Sequence[Event]) -> Figures:
    """Arms, comparisons and what the solves were like, from the results.json and the events of the round's run."""
    metric = results["primary_metric"]
    scores = {arm: row[metric]["per_seed"] for arm, row in results["variants"].items()}
    found = [paired(scores[a], scores[b]) for a, b in made.family]
    corrected = holm([each.p_value for each in found])
    comparisons = []
    for (a, b), each, p_holm in zip(made.family, found, corrected, strict=True):
        _, spread = mean_std([x - y for x, y in zip(scores[a], scores[b], strict=True)])
        detectable = None if spread is None else smallest_effect(len(scores[a]), spread)
        comparisons.append(
            {
                **{"a": a, "b": b, "difference": each.difference, "ci95": each.ci95},
                **{"p_value": each.p_value, "p_holm": p_holm, "spread": spread, "detectable": detectable},
            }
        )
    return {
        "seeds": results["seeds"],
        "metric": metric,
        "arms": {arm: _arm(row, metric) for arm, row in results["variants"].items()},
        "comparisons": comparisons,
        "solves": solves(events),
    }


def solves(events: Sequence[Event]) -> dict[str, Figures]:
    """cos(x, v) and ||x - v|| / ||v|| of every solve: range and median, by arm; products, statuses."""
    kinds: dict[str, list[Event]] = {}
    for event in select(events, "bissl", "upper"):
        if event.get("status") is not None:
            kinds.setdefault(event["variant"], []).append(event)
    rows = {}
    for arm, solved in kinds.items():
        cosines, changes = ([float(e[field]) for e in solved] for field in ("cosine", "relative_change"))
        by_alternation: dict[int, list[float]] = {}
        for event in solved:
            by_alternation.setdefault(int(event["alternation"]), []).append(float(event["cosine"]))
        rows[arm] = {
            "solves": len(solved),
            "cosine": {"min": min(cosines), "median": statistics.median(cosines), "max": max(cosines)},
            "relative_change": {
                "min": min(changes),
                "median": statistics.median(changes),
                "max": max(changes),
            },
            "cosine_by_alternation": [statistics.median(by_alternation[i]) for i in sorted(by_alternation)],
            "products": statistics.mean(float(e["num_hvps"]) for e in solved),
            "statuses": {s: sum(e["status"] == s for e in solved) for s in sorted({e["status"] for e in solved})},
        }
    return rows


def _arm(row: Mapping[str, Any], metric: str) -> Figures:
    kept = {name: row[name] for name in ("pretext_steps", "label_steps", "seconds")}
    return {**row[metric], **kept}


def design_table(made: Round) -> str:
    """What the round can find, by comparison, before it is run."""
    rows = [
        [
            f"`{a}` − `{b}`",
            f"{made.spreads[a, b]:.2f}",
            f"{smallest_effect(made.seeds, made.spreads[a, b]):.2f}",
            f"{smallest_effect(made.seeds, made.spreads[a, b], level=made.strictest_level):.2f}",
        ]
        for a, b in made.family
    ]
    header = ["arms", "expected spread", "detectable at 5%", f"at 5%/{len(made.family)} (Holm's first step)"]
    return table(header, rows)


def tables(made: Round, figures: Figures | None) -> dict[str, str]:
    """The tables of the page, by the names of their markers; of a round without figures all say that it was not run."""
    if figures is None:
        names = ("arms", "comparisons", "solves", *(("rates",) if made.search else ()))
        return {f"evidence-{made.name}-{name}": NOT_RUN for name in names}
    texts = {"arms": _arms(figures), "comparisons": _comparisons(figures), "solves": _solves(figures)}
    if made.search:
        texts["rates"] = _rates(figures["search"])
    return {f"evidence-{made.name}-{name}": text for name, text in texts.items()}


def _arms(figures: Figures) -> str:
    rows = [
        [
            *(f"`{arm}`", f"{r['mean']:.2f} ± {r['std']:.2f}"),
            *(str(r["pretext_steps"]), str(r["label_steps"]), f"{r['seconds']:.0f}"),
        ]
        for arm, r in figures["arms"].items()
    ]
    return f"{table(['arm', 'top-1 (%)', 'pretext steps', 'label steps', 'seconds'], rows)}\n\n{conditions(figures)}"


def _comparisons(figures: Figures) -> str:
    rows = [
        [
            f"`{c['a']}` − `{c['b']}`",
            f"{c['difference']:+.2f} [{c['ci95'][0]:+.2f}, {c['ci95'][1]:+.2f}]",
            f"{c['p_value']:.3f}",
            f"{c['p_holm']:.3f}",
            f"{c['detectable']:.2f}",
        ]
        for c in figures["comparisons"]
    ]
    return table(["arms", "difference [95% interval]", "p", "p after Holm", "detectable"], rows)


def _solves(figures: Figures) -> str:
    rows = [
        [
            *(f"`{arm}`", str(r["solves"])),
            *(f"{r['cosine'][key]:.3f}" for key in ("min", "median", "max")),
            *(f"{r['relative_change']['median']:.3f}", f"{r['products']:.1f}"),
            ", ".join(f"{count} {status}" for status, count in r["statuses"].items()),
        ]
        for arm, r in figures["solves"].items()
    ]
    return table(["arm", "solves", "cos least", "median", "most", "‖x−v‖/‖v‖", "products", "statuses"], rows)


def _rates(search: Figures) -> str:
    rates = [f"{rate:g}" for rate in search["rates"]]
    rows = [
        [f"`{arm}`", *(f"{each['mean'][rate]:.2f}" for rate in rates), f"{each['chosen']:g}"]
        for arm, each in search["arms"].items()
    ]
    return table(["validation top-1 (%)", *(f"`upper_lr` {rate}" for rate in rates), "chosen"], rows)
