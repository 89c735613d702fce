"""The picture of the page: what the solve gains, against where the two tasks disagree."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure


def draw_figure(curves: Mapping[str, Any], path: Path) -> None:
    """One curve a lambda, with its 95% band."""
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for weight, rows in curves["lambda"].items():
        gain, error = (np.array([row[field] for row in rows]) for field in ("mean", "error"))
        middle, low, high = (np.exp(-values) for values in (gain, gain + error, gain - error))
        (line,) = axes.plot(curves["flatness"], middle, label=f"λ = {weight}")
        axes.fill_between(curves["flatness"], low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_yscale("log", base=2)
    axes.set_yticks([0.7, 1.0, 1.4, 2.0, 2.8, 4.0], ["0.7", "1", "1.4", "2", "2.8", "4"])
    axes.set_xlabel("flatness: below 0 the tasks disagree where the pretext loss is steep, above 0 where it is flat")
    axes.set_ylabel("risk with x = A⁻¹v over that with x = v")
    axes.legend(frameon=False)
    with matplotlib.rc_context({"svg.hashsalt": "disagreement", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
