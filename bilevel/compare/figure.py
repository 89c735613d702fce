"""The picture of the curves: one row a system, error against products and against time, every line labelled."""

import io
import re
import statistics
from collections.abc import Collection, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from bilevel.compare.tables import names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of middle lightness, so that they stand out from white and from black.
COLORS = {
    "CG": "#2f86d6",
    "CG, recycled": "#00a3a3",
    "CG, diagonal": "#7d8ff0",
    "CG, Nyström": "#12a150",
    "MINRES": "#d1852b",
    "Escalating(CG)": "#8a9a2b",
    "layer-wise CG": "#e0524f",
    "Neumann": "#b06fd8",
    "Nyström": "#5f9a5f",
    "Dense": "#a5815f",
    "Identity": "#888888",
}
OTHERS = ("#c2417e", "#3f9fb5", "#b5862f", "#6f79c9", "#4f9c3a")
INK = "#808080"
FLOOR, CEILING = 1e-10, 10.0
TICKS = (1, 3, 10, 30, 100, 300, 1000, 3000, 10000)
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "solvers",
    # Names may hold any character, so nothing is read as a formula.
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 7.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


class NotDrawnError(ValueError):
    """matplotlib cannot be imported."""


def picture(rows: Sequence[Mapping[str, Any]], *, noise: Mapping[str, float], later: Collection[str]) -> str:
    """The curves of `measure_curves` as SVG.

    Args:
        noise: noise floors by the names of the systems that have one.
        later: systems whose later right-hand sides have a row of their own, since they go another way than the first.

    Raises:
        NotDrawnError: matplotlib cannot be imported.
    """
    figure_class, rc_context = _matplotlib()
    systems = names(rows, "system")
    panels = [(name, "first") for name in systems]
    panels += [(name, "later") for name in systems if name in later]
    colors = _colors(names(rows, "solver"))
    with rc_context(STYLE):
        figure = figure_class(figsize=(7.6, 2.0 * len(panels)))
        # The same room in inches above the first row and below the last one, however many there are.
        margin = 8.0 / len(panels)
        grid = figure.subplots(
            len(panels),
            2,
            squeeze=False,
            gridspec_kw={
                **{"wspace": 0.5, "hspace": 0.6, "left": 0.08, "right": 0.86},
                **{"top": 1.0 - 0.025 * margin, "bottom": 0.03 * margin},
            },
        )
        for (system, use), (left, right) in zip(panels, grid, strict=True):
            shown = _shown(rows, system, use)
            for axes, quantity in ((left, "products"), (right, "gradients")):
                _panel(axes, shown, quantity, noise.get(system), colors)
            which = "first right-hand side" if use == "first" else "later right-hand sides, state reused"
            left.set_title(f"{system}: {which}", loc="left", fontsize=8.5, fontweight="bold", pad=10)
            left.set_ylabel("relative error")
            left.set_xlabel("products with A", labelpad=1)
            right.set_xlabel("time, in gradients", labelpad=1)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    return _compact(drawn.getvalue())


def _matplotlib() -> tuple[type["Figure"], Any]:
    try:
        from matplotlib import rc_context  # an optional package
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NotDrawnError(
            f"a picture needs matplotlib, which cannot be imported ({error}); run: pip install matplotlib"
        ) from error
    return Figure, rc_context


def _colors(solvers: Sequence[str]) -> dict[str, str]:
    others = cycle(OTHERS)
    return {solver: COLORS[solver] if solver in COLORS else next(others) for solver in solvers}


def _compact(svg: str) -> str:
    """The same picture in fewer bytes: one decimal, the generic font, no metadata, no space between the elements."""
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r"(\d+\.\d)\d+", r"\1", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"|; stroke-linecap: square', "", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: sans-serif", svg)
    svg = re.sub(r"font: ([\d.]+px) '[^;\"]*", r"font: \1 sans-serif", svg)
    return re.sub(r"\s*\n\s*", " ", re.sub(r">\s+<", "><", svg)).strip() + "\n"


def _shown(rows: Sequence[Mapping[str, Any]], system: str, use: str) -> dict[str, list[Mapping[str, Any]]]:
    """Points by solver, without what would lie on CG's line."""
    found = {row["solver"]: row["points"] for row in rows if (row["system"], row["use"]) == (system, use)}
    if use == "first":
        found.pop("CG, recycled", None)
    errors = {solver: [point["errors"] for point in points] for solver, points in found.items()}
    if errors.get("Escalating(CG)") == errors.get("CG"):
        found.pop("Escalating(CG)", None)
    return found


def _panel(
    axes: "Axes",
    shown: Mapping[str, list[Mapping[str, Any]]],
    quantity: str,
    noise: float | None,
    colors: Mapping[str, str],
) -> None:
    ends = {}
    for solver, points in shown.items():
        x = [max(statistics.median(point[quantity]), 0.5) for point in points]
        y = [_clipped(point["error"]["median"]) for point in points]
        color = colors[solver]
        if solver == "Identity":
            axes.axhline(y[0], color=color, linewidth=1.0, linestyle=":")
        else:
            width = 1.8 if solver.startswith("CG") else 1.2
            marker = "o" if len(points) == 1 else ""
            axes.plot(x, y, color=color, linewidth=width, marker=marker, markersize=4.0, clip_on=False)
            low, high = ([_clipped(point["error"][key]) for point in points] for key in ("q1", "q3"))
            if low != high:
                axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        ends[solver] = (x[-1], y[-1])
    if noise is not None:
        axes.axhline(noise, color=INK, linewidth=0.8, linestyle="--")
        # In the corner that no curve enters.
        axes.text(0.02, 0.14, "- - noise of the batches", transform=axes.transAxes, fontsize=6.5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(FLOOR, CEILING)
    axes.set_yticks([1e-8, 1e-4, 1.0], ["1e-8", "1e-4", "1"])
    low, high = axes.get_xlim()
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.2, color=INK, linewidth=0.6)
    _label(axes, ends, colors)


def _label(axes: "Axes", ends: Mapping[str, tuple[float, float]], colors: Mapping[str, str]) -> None:
    """Names in the right margin, none on another, each with a thin line to the end of its curve."""
    order = sorted(ends, key=lambda solver: ends[solver][1], reverse=True)
    wanted = [axes.transAxes.inverted().transform(axes.transData.transform(ends[solver]))[1] for solver in order]
    for solver, height in zip(order, apart(wanted, 0.1), strict=True):
        # Identity is a line through the whole panel, which ends at its border.
        x, y = ends[solver]
        start = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))
        begin = (1.0, start[1]) if solver == "Identity" else (start[0], start[1])
        color = colors[solver]
        axes.plot(
            [begin[0], 1.03],
            [begin[1], height],
            transform=axes.transAxes,
            color=color,
            linewidth=0.5,
            alpha=0.6,
            clip_on=False,
        )
        axes.text(1.04, height, solver, transform=axes.transAxes, color=color, va="center", fontsize=7)


def apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions from the top down, near to the wanted ones, with this gap between neighbours and within the panel."""
    placed, lowest = [], gap * (len(wanted) - 1)
    ceiling = max(1.0, lowest)
    for place in wanted:
        placed.append(min(place, ceiling))
        ceiling = placed[-1] - gap
    floor = 0.0
    for index in reversed(range(len(placed))):
        placed[index] = max(placed[index], floor)
        floor = placed[index] + gap
    return placed


def _clipped(value: float) -> float:
    return min(max(value, FLOOR), CEILING)
