"""Draws the embedded features of several backbones side by side, one colour for each class, as a PNG."""

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ....experiment.plots import matplotlib_parts
from .extraction import Array, Labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#000000"),
    *("#999999", "#8c4a2f", "#5e3c99"),
)
"""Okabe and Ito's palette for all kinds of colour vision, without the yellow that white swallows; then three more."""

MARKERS = "o^sD"
"""Ten colours and four shapes: no two of 20 classes share both, and neighbours differ in both."""

NAMED = 20
"""At most this many classes are named in a legend."""

PANEL = 4.4
LONGEST_NAME = 24
LINE = 60


@dataclass(frozen=True)
class ScatterPanel:
    """The points of one backbone, what it is, and a line of numbers below it."""

    title: str
    points: Array
    note: str


def scatter_png(panels: Sequence[ScatterPanel], labels: Labels, classes: Sequence[str], caption: str) -> bytes:
    """The panels in a row on axes of the same scale, with a legend of the classes where there are at most `NAMED`.

    Args:
        panels: Points ``[N, 2]`` of the same N images each.
        labels: ``[N]``, positions in `classes`.
        classes: Their names.
        caption: Below the panels; wrapped.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure_class, rc_context = matplotlib_parts("the picture of features")
    present = np.unique(labels)
    styles = _styles(len(classes))
    # Names of classes may hold any character, so nothing is read as a formula.
    with rc_context({"text.parse_math": False, "font.size": 9.5}):
        names = [textwrap.shorten(classes[int(c)], LONGEST_NAME, placeholder="…") or "?" for c in present]
        columns = max(1, min(len(names), LINE * len(panels) // (max(map(len, names)) + 6)))
        rows = -(-len(names) // columns) if len(names) <= NAMED else 0
        text = textwrap.fill(caption, 75 * len(panels))
        below = 0.17 * rows + 0.17 * (text.count("\n") + 1) + 0.25
        height = PANEL + 0.45 + below
        figure = figure_class(figsize=(PANEL * len(panels), height), dpi=150)
        figure.set_layout_engine("constrained", rect=(0, below / height, 1, 1 - below / height), wspace=0.03)
        extent = 1.06 * max(float(np.abs(_centred(panel.points)).max()) for panel in panels)
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
            _draw(axes, panel, labels, styles, extent)
        _write_below(figure, rows, columns, [styles[c] for c in present], names, text)
        buffer = io.BytesIO()
        # No date and no version: the same points make the same file.
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _styles(classes: int) -> list[dict[str, Any]]:
    """Colour and shape of each class."""
    if classes <= NAMED:
        return [{"color": COLOURS[c % len(COLOURS)], "marker": MARKERS[c % len(MARKERS)]} for c in range(classes)]
    from matplotlib import colormaps

    # Golden-ratio steps, so that neighbours in the list of classes are far apart in colour.
    return [{"color": colormaps["turbo"](0.618034 * c % 1.0), "marker": MARKERS[c % 4]} for c in range(classes)]


def _centred(points: Array) -> Array:
    return points - (points.max(axis=0) + points.min(axis=0)) / 2


def _draw(axes: "Axes", panel: ScatterPanel, labels: Labels, styles: Sequence[dict[str, Any]], extent: float) -> None:
    points = _centred(panel.points)
    size = float(np.clip(9000 / len(points), 5, 26))
    for c in np.unique(labels):
        own = points[labels == c]
        axes.scatter(own[:, 0], own[:, 1], s=size, alpha=0.8, linewidths=0, **styles[c])
    axes.set(xlim=(-extent, extent), ylim=(-extent, extent), xticks=[], yticks=[], aspect="equal")
    axes.set_title(panel.title, fontsize=11, loc="left")
    axes.set_xlabel(panel.note, fontsize=9)
    axes.spines[:].set_color("#b0b0b0")


def _write_below(
    figure: "Figure", rows: int, columns: int, styles: Sequence[dict[str, Any]], names: Sequence[str], text: str
) -> None:
    from matplotlib.lines import Line2D

    if rows:
        handles = [Line2D([], [], linestyle="", markersize=5.5, **style) for style in styles]
        bottom = (0.17 * (text.count("\n") + 1) + 0.12) / figure.get_figheight()
        figure.legend(
            handles,
            names,
            loc="lower center",
            bbox_to_anchor=(0.5, bottom),
            ncols=columns,
            frameon=False,
            borderpad=0,
            labelspacing=0.25,
            columnspacing=1.2,
            handletextpad=0.1,
            fontsize=9,
        )
    figure.text(0.012, 0.06 / figure.get_figheight(), text, fontsize=8, color="#444444", va="bottom")
