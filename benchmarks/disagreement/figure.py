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
        middle, low, high = (100.0 * np.expm1(-values) for values in (gain, gain + error, gain - error))
        (line,) = axes.plot(curves["flatness"], middle, label=f"λ = {weight}")
        axes.fill_between(curves["flatness"], low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.axhline(0.0, color="grey", linewidth=0.8)
    axes.set_yscale("symlog", linthresh=20.0)
    axes.set_yticks([-60, -20, 0, 20, 100, 300], ["−60%", "−20%", "0", "+20%", "+100%", "+300%"])
    axes.set_xlabel("where the tasks disagree: below 0 where the pretext loss is steep, above 0 where it is flat")
    axes.set_ylabel("risk of x = A⁻¹v beside x = v")
    axes.legend(frameon=False)
    with matplotlib.rc_context({"svg.hashsalt": "disagreement", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
