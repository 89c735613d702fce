"""Draws test scores over the length of pre-training (the paper's Figure 2), as a PNG."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from ....experiment.plots import DASHES, PALETTE, matplotlib_parts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, float, float]
"""(epochs, mean, standard deviation over the seeds)."""

MARKERS = "osD^vP"

LINE = 100
"""Characters of a line of the note."""

ASIDE = 0.008
"""Sideways distance of neighbouring arms at the same length (share of the range of lengths)."""


def length_curve_png(arms: Mapping[str, Sequence[Point]], *, title: str, metric: str, note: str) -> bytes:
    """A line an arm with its standard deviation, over total pretext epochs.

    Args:
        arms: Points by arm, in the order of the legend; the first is drawn over the others.
        title: What was tested.
        metric: With its unit, for the vertical axis.
        note: Below the axes; wrapped.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure_class, rc_context = matplotlib_parts("the figure")
    with rc_context({"text.parse_math": False, "font.size": 9.5}):
        text = textwrap.fill(note, LINE)
        below = 0.17 * (text.count("\n") + 1) + 0.13
        height = 3.9 + below
        figure = figure_class(figsize=(6.4, height), dpi=150)
        figure.set_layout_engine("constrained", rect=(0, below / height, 1, 1 - below / height))
        axes = figure.subplots()
        lengths = sorted({x for points in arms.values() for x, _, _ in points})
        # Bars of one length would hide each other.
        step = ASIDE * ((lengths[-1] - lengths[0]) or 1.0)
        for index, (arm, points) in reversed(list(enumerate(arms.items()))):
            _draw(axes, index, arm, points, step * (index - (len(arms) - 1) / 2))
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("pretext epochs in all")
        axes.set_ylabel(metric)
        axes.grid(alpha=0.25, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        _set_ticks(axes, lengths)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside upper right", ncols=4, frameon=False)
        figure.text(0.015, 0.06 / height, text, fontsize=8, color="#444444", va="bottom")
        buffer = io.BytesIO()
        # No date and no version: the same points make the same file.
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw(axes: "Axes", index: int, arm: str, points: Sequence[Point], aside: float) -> None:
    x, mean, deviation = zip(*sorted(points), strict=True)
    axes.errorbar(
        [value + aside for value in x],
        mean,
        yerr=deviation,
        label=arm,
        color=PALETTE[index % len(PALETTE)],
        linestyle=DASHES[index % len(DASHES)],
        marker=MARKERS[index % len(MARKERS)],
        markersize=5,
        linewidth=1.6,
        elinewidth=1.1,
        capsize=2.5,
    )


def _set_ticks(axes: "Axes", epochs: Sequence[float]) -> None:
    """A tick at each length that was run, unless they stand too close to be read."""
    from matplotlib.ticker import MaxNLocator

    span = epochs[-1] - epochs[0]
    gaps = [later - earlier for earlier, later in pairwise(epochs)]
    if not gaps or min(gaps) > span / 15:
        axes.set_xticks(list(epochs), [f"{value:g}" for value in epochs])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
