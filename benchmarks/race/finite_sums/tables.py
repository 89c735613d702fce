"""The finite sums' tables and their figure, from the kept figures."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import pages
from benchmarks.race.finite_sums.measure import SHARES, Figures, reached

DRAWN = ("SOBA", "SABA", "SRBA", "AmIGO", "stocBiO", "implicit, CG")
"""Methods in the figure, by the first part of their titles; the others' curves are in the kept figures."""


def targets(problem: Figures) -> list[float]:
    return [problem["start"] - share * (problem["start"] - problem["lowest"]) for share in SHARES]


def way(row: Figures, target: float) -> str:
    """Seconds, thousands of oracle calls and iterations: medians of the runs that get there."""
    found = [(curve, place) for curve in row["curves"] if (place := reached(curve, target)) is not None]
    if not found:
        return "–"
    seconds, oracles, iterations = (
        statistics.median(curve[name][place] for curve, place in found) for name in ("seconds", "oracles", "iterations")
    )
    text = f"{seconds:.2g} s, {oracles / 1000.0:.3g} k, {iterations:.0f}"
    return text if len(found) == len(row["curves"]) else f"{text} ({len(found)} of {len(row['curves'])} runs)"


def rate(row: Figures) -> str:
    """Iterations a second."""
    rates = [c["iterations"][-1] / c["seconds"][-1] for c in row["curves"] if c["seconds"] and c["seconds"][-1] > 0]
    return f"{float(f'{statistics.median(rates):.2g}'):,g}" if rates else "–"


def end(row: Figures, problem: Figures) -> str:
    """How far the middle run of those that did not diverge came, in percent of the way, and how many did."""
    values = [curve["values"][-1] for curve in row["curves"] if curve["values"] and "failure" not in curve]
    if not values:
        return "diverged"
    share = (problem["start"] - statistics.median(values)) / (problem["start"] - problem["lowest"])
    text, lost = f"{100 * share:.1f}%" if share > -1 else "diverged", len(row["curves"]) - len(values)
    return f"{text} ({lost} of {len(row['curves'])} runs diverged)" if lost else text


def problem_table(problem: Figures) -> tuple[list[str], list[list[str]]]:
    rows = []
    for row in ordered(problem["rows"]):
        ways = [way(row, target) for target in targets(problem)]
        rows.append([row["method"], *ways, end(row, problem), rate(row), f"{row['size']:g}, {row['ratio']:g}"])
    rows += [[title, reason, *[""] * (len(SHARES) + 2)] for title, reason in problem["failures"].items()]
    header = ["", *(f"to {100 * share:g}%" for share in SHARES), "came to", "iterations a second", "step, ratio"]
    return header, rows


def ordered(rows: list[Figures]) -> list[Figures]:
    """Methods of the same name one after the other."""
    names = list(dict.fromkeys(row["method"].split(" (")[0] for row in rows))
    return sorted(rows, key=lambda row: names.index(row["method"].split(" (")[0]))


def tables(figures: Figures) -> dict[str, str]:
    """Every text of the page by the name in its markers."""
    first = figures["problems"][0]
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items() if version)
    setting = (
        f"Beside {versions}. " if versions else ""
    ) + f"{first['tried']} pairs of steps tried, {len(first['rows'][0]['curves'])} runs with the best one."
    named = {
        f"finite-sums-{p['problem'].replace(' ', '-')}": pages.table(*problem_table(p)) for p in figures["problems"]
    }
    return {"finite-sums-conditions": f"{pages.conditions(figures)} {setting}", **named}


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """The rest of the way against seconds and against oracle calls, one row a problem."""
    problems = figures["problems"]
    figure = Figure(figsize=(11, 3.4 * len(problems)), layout="constrained")
    panels = figure.subplots(len(problems), 2, squeeze=False)
    for line, problem in zip(panels, problems, strict=True):
        for panel, (name, label) in zip(line, (("seconds", "seconds"), ("oracles", "oracle calls")), strict=True):
            draw_problem(panel, problem, name, label)
    handles = {handle.get_label(): handle for panel in panels.flat for handle in panel.get_legend_handles_labels()[0]}
    figure.legend(handles=list(handles.values()), loc="outside right upper", frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "finite sums", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def draw_problem(panel: Axes, problem: Figures, name: str, label: str) -> None:
    """One line a method, of its middle run; this package's are solid."""
    span = problem["start"] - problem["lowest"]
    for row in ordered(problem["rows"]):
        method, _, package = row["method"].partition(" (")
        curves = sorted((c for c in row["curves"] if len(c["values"]) > 1), key=lambda c: c["values"][-1])
        if method not in DRAWN or not curves:
            continue
        curve = curves[len(curves) // 2]
        gaps = [max((value - problem["lowest"]) / span, 1e-6) for value in curve["values"]]
        colour, style = f"C{DRAWN.index(method)}", (0, (4, 2)) if package else "-"
        panel.plot(curve[name][1:], gaps[1:], linestyle=style, color=colour, label=row["method"], linewidth=1.6)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_ylim(5e-4, 1.5)
    panel.set_title(problem["problem"], fontsize=10)
    panel.set_xlabel(label)
    panel.set_ylabel("of the way left")
    panel.grid(True, which="major", linewidth=0.3)
