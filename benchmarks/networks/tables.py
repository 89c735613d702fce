"""The tables of docs/networks.md from the figures of run.py."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks import pages
from benchmarks.networks.problems import KINDS

Figures = Mapping[str, Any]

VECTORS = [kind for kind in KINDS if kind != "smoothing"]
"""Kinds of more than one number, which have a direction."""


def spread(values: Iterable[float], number: Callable[[float], str] = pages.number) -> str:
    """Median, smallest and largest."""
    ordered = sorted(values)
    middle, *ends = [number(v) for v in (statistics.median(ordered), ordered[0], ordered[-1])]
    return middle if ends[0] == ends[1] else f"{middle} ({ends[0]} to {ends[1]})"


def counts(values: Iterable[float]) -> str:
    """As `spread`, in full."""
    return spread(values, lambda value: f"{value:g}")


def statuses(names: Iterable[str]) -> str:
    counted = Counter(names)
    shown = [name.lower().replace("_", " ") for name in counted]
    if len(counted) == 1:
        return shown[0]
    return ", ".join(f"{count} {name}" for name, count in zip(shown, counted.values(), strict=True))


def solves(label: str, several: Sequence[Figures], *, lengths: bool) -> list[str]:
    """One row: the same solve for every seed."""

    def of(kind: str, what: str) -> list[float]:
        return [s["kinds"][kind][what] for s in several]

    row = [label, statuses(s["status"] for s in several), counts(s["products"] for s in several)]
    row += [spread(of(kind, "cosine")) for kind in VECTORS]
    row += [spread(of(kind, "ratio")) for kind in VECTORS] if lengths else []
    signed = [c * r for c, r in zip(of("smoothing", "cosine"), of("smoothing", "ratio"), strict=True)]
    return [*row, spread(signed), spread(s["found"] for s in several)]


def header(first: str, *, lengths: bool) -> list[str]:
    names = [f"cosine, {KINDS[kind]}" for kind in VECTORS]
    names += [f"length, {KINDS[kind]}" for kind in VECTORS] if lengths else []
    return [first, "status", "products", *names, "smoothing, times the reference", "wrong labels"]


def by_network(figures: Figures, table: Callable[[Sequence[Figures]], str]) -> str:
    """One table a network under its name."""
    return "\n\n".join(f"**{name}**\n\n{table(found['seeds'])}" for name, found in figures["networks"].items())


def terms(seeds: Sequence[Figures]) -> str:
    rows = [
        solves(f"{row['fraction']:g}", [seed["terms"][i] for seed in seeds], lengths=True)
        for i, row in enumerate(seeds[0]["terms"])
    ]
    return pages.table(header("term / largest eigenvalue", lengths=True), rows)


def solvers(seeds: Sequence[Figures]) -> str:
    rows = [
        solves(name, [seed["solvers"][name] for seed in seeds if name in seed["solvers"]], lengths=False)
        for name in {name: None for seed in seeds for name in seed["solvers"]}
    ]
    return pages.table(header("solver", lengths=False), rows)


def steps(seeds: Sequence[Figures]) -> str:
    rows = []
    for i, row in enumerate(seeds[0]["steps"]):
        several = [seed["steps"][i] for seed in seeds]
        label, *others = solves(str(row["steps"]), several, lengths=False)
        rows.append([label, spread(s["stationarity"] for s in several), *others])
    first, *others = header("lower steps", lengths=False)
    return pages.table([first, "stationarity", *others], rows)


def reference(figures: Figures) -> str:
    """The reference of each network, and the derivative of a whole training of the first one."""
    measured = {
        f"{name}, further steps": [s["reference"] for s in f["seeds"]] for name, f in figures["networks"].items()
    }
    measured["CNN, whole training"] = figures["networks"]["CNN"]["whole"]
    rows = []
    for label, seeds in measured.items():
        for kind, name in KINDS.items():
            several = [seed[kind] for seed in seeds]
            ratio = spread(s["measured"] / s["length"] for s in several)
            labels = "" if kind != "weights" else spread(s["found"] for s in several)
            rows.append([label, name, spread(s["length"] for s in several), ratio, labels])
    return pages.table(["derivative of", "kind", "length", "difference / derivative", "wrong labels"], rows)


def scale(figures: Figures) -> str:
    rows = [
        [
            name,
            spread(seed["largest_ritz"] for seed in found["seeds"]),
            spread(seed["suggestion"] / seed["largest_ritz"] for seed in found["seeds"] if seed["suggestion"]),
            counts(seed["warm"]["cold"] for seed in found["seeds"]),
            counts(seed["warm"]["warm"] for seed in found["seeds"]),
        ]
        for name, found in figures["networks"].items()
    ]
    suggested, warm = "suggested term / that", "from the solution before"
    return pages.table(["network", "largest eigenvalue", suggested, "products, from nothing", warm], rows)


def modes(figures: Figures) -> str:
    several = [seed["modes"] for seed in figures["networks"]["CNN"]["seeds"]]
    rows = [
        [above, spread(m[above]["cosine"] for m in several), spread(m[above]["ratio"] for m in several)]
        for above in ("train", "eval")
    ]
    return pages.table(["upper objective in", "cosine, weight decay", "length, weight decay"], rows)


def training(figures: Figures) -> str:
    rows = figures["networks"]["CNN"]["training"]
    found = []
    for name in {row["method"]: None for row in rows}:
        several = [row for row in rows if row["method"] == name]
        ended = Counter[str]()
        for row in several:
            ended.update(row["statuses"])
        text = ", ".join(f"{count} {status.lower().replace('_', ' ')}" for status, count in ended.items())
        losses = [spread(row[key] for row in several) for key in ("validation", "test", "found")]
        found.append([name, text, *losses])
    return pages.table(["trained by", "solves", "validation loss", "test loss", "wrong labels"], found)


def tables(figures: Figures) -> dict[str, str]:
    """Every text of the page by the name in its markers."""
    return {
        "conditions": f"{pages.conditions(figures)} {figures['settings']}",
        "reference": reference(figures),
        "scale": scale(figures),
        "terms": by_network(figures, terms),
        "solvers": by_network(figures, solvers),
        "steps": by_network(figures, steps),
        "modes": modes(figures),
        "training": training(figures),
    }
