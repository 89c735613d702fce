"""The race's curves as a figure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLES = {"TorchOpt": (0, (5, 2)), "Betty": (0, (1, 1.5))}
"""Dashes by the first word of a method's name; this package's own are solid."""


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """Distance of F(x, y*(x)) from the lowest value met against seconds, one panel a problem."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels = figure.subplots(1, len(figures["races"]), squeeze=False)[0]
    for panel, race in zip(panels, figures["races"], strict=True):
        draw_race(panel, race)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "race", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def draw_race(panel: Axes, race: Mapping[str, Any]) -> None:
    """One line for each method, of its middle run by the value at the end."""
    colours = matplotlib.colormaps["tab20"]
    for index, row in enumerate(race["rows"]):
        curves = sorted(row["curves"], key=lambda curve: curve["values"][-1])
        curve = curves[len(curves) // 2]
        gaps = [max(value - race["lowest"], 1e-12) for value in curve["values"]]
        style = STYLES.get(row["method"].split(",")[0], "-")
        width = 1.4 if row["method"].split(",")[0] in STYLES else 2.0
        panel.plot(
            curve["times"][1:], gaps[1:], linestyle=style, linewidth=width, color=colours(index), label=row["method"]
        )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_ylim(bottom=1e-3 * (race["start"] - race["lowest"]), top=1.5 * (race["start"] - race["lowest"]))
    panel.set_title(race["race"])
    panel.set_xlabel("seconds")
    panel.set_ylabel("F(x, y*(x)) above the lowest met")
    panel.grid(True, which="major", linewidth=0.3)
