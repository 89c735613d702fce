"""Draws recorded curves with matplotlib, as SVG for an HTML page, in the page's own text colour."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .records import NOT_RECORDED, Band, Curve, mean_curve, thin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Legible on white and on near-black; a sentinel stands for the page's own text colour until the SVG is written.
PALETTE = ("#2f7fd0", "#e0732b", "#2a9d6f", "#b35fb0", "#b08a1e", "#d64f62")
DASHES = ("-", "--", ":", "-.")
TEXT = "#010203"

PANEL_WIDTH, PANEL_HEIGHT = 4.1, 2.6
WIDE_PANEL_WIDTH = 5.6


@dataclass(frozen=True)
class Panel:
    """One pair of axes: what it shows, and the curves of each variant (one for each seed) or its band."""

    title: str
    x_label: str
    curves: Mapping[str, Mapping[int, Curve]] = field(default_factory=dict)
    bands: Mapping[str, Band] = field(default_factory=dict)
    logarithmic: bool = False
    integer: bool = False


@dataclass(frozen=True)
class Drawing:
    """An SVG element and what a reader must know beside it: values that could not be drawn."""

    svg: str
    not_finite: int


def draw(name: str, panels: Sequence[Panel], variants: Sequence[str], *, columns: int = 2) -> Drawing | None:
    """The panels in a grid under one legend; an empty panel says that nothing was recorded. None if all are empty.

    Args:
        name: distinguishes the identifiers inside this SVG from those of the page's other drawings.
        variants: all variants in their order, which fixes their colours across drawings; the first is drawn on top.

    Raises:
        ValueError: matplotlib is not installed.
    """
    if not any(panel.curves or panel.bands for panel in panels):
        return None
    rows = math.ceil(len(panels) / columns)
    width = columns * (WIDE_PANEL_WIDTH if columns == 2 else PANEL_WIDTH)
    figure_class, rc_context = matplotlib_parts("a drawing")
    # Names may hold any character, so nothing is read as a formula; glyphs stay text in the page's fonts.
    with rc_context({"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9.5}):
        figure = figure_class(figsize=(width, rows * PANEL_HEIGHT + 0.45))
        figure.set_layout_engine("constrained", hspace=0.07, wspace=0.04)
        figure.patch.set_alpha(0.0)
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, panel in zip(grid, panels, strict=False):
            _draw_panel(axes, panel, variants)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        _draw_legend(figure, grid, variants)
        # matplotlib's own description of the picture holds web addresses, which a self-contained page has no use for.
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    values = [curve.y for panel in panels for by_seed in panel.curves.values() for curve in by_seed.values()]
    return Drawing(_embeddable(buffer.getvalue()), int(sum(np.isnan(y).sum() for y in values)))


def matplotlib_parts(what: str) -> tuple[type["Figure"], Any]:
    """matplotlib's Figure and rc_context.

    Raises:
        ValueError: matplotlib is not installed, which `what` needs.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            f'{what} needs matplotlib, which cannot be imported ({error}); run: pip install "bilevel[demo]"'
        ) from error
    return Figure, rc_context


def _draw_panel(axes: "Axes", panel: Panel, variants: Sequence[str]) -> None:
    axes.set_title(panel.title, fontsize=10, color=TEXT, loc="left")
    axes.set_xlabel(panel.x_label, color=TEXT)
    axes.patch.set_alpha(0.0)
    axes.tick_params(colors=TEXT, labelsize=8.5)
    axes.grid(color=TEXT, alpha=0.12, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(TEXT)
    drawn = False
    # The first variant is the one of interest, so it is drawn last, over the others.
    for index, variant in reversed(list(enumerate(variants))):
        style = {"color": PALETTE[index % len(PALETTE)], "linestyle": DASHES[index // len(PALETTE) % len(DASHES)]}
        drawn |= _draw_seeds(axes, panel.curves.get(variant, {}), variant, style)
        drawn |= _draw_band(axes, panel.bands.get(variant), variant, style, logarithmic=panel.logarithmic)
    if drawn:
        _set_scales(axes, panel)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(0.5, 0.5, NOT_RECORDED, color=TEXT, alpha=0.6, ha="center", va="center", transform=axes.transAxes)


def _draw_seeds(axes: "Axes", by_seed: Mapping[int, Curve], variant: str, style: dict[str, Any]) -> bool:
    by_seed = {seed: curve for seed, curve in by_seed.items() if np.isfinite(curve.y).any()}
    if not by_seed:
        return False
    if len(by_seed) > 1:
        for curve in map(thin, by_seed.values()):
            axes.plot(curve.x, curve.y, linewidth=0.7, alpha=0.35, **style)
    average = thin(mean_curve(by_seed))
    width = 1.6 if average.x.size <= 400 else 1.0
    axes.plot(average.x, average.y, label=variant, linewidth=width, marker=_marker(average), markersize=3.5, **style)
    return True


def _draw_band(axes: "Axes", band: Band | None, variant: str, style: dict[str, Any], *, logarithmic: bool) -> bool:
    if band is None or not np.isfinite(band.mean).any():
        return False
    mean = thin(Curve(band.x, band.mean))
    axes.plot(mean.x, mean.y, label=variant, linewidth=1.6, marker=_marker(mean), markersize=3.5, **style)
    # A logarithmic axis has no place for the zero that an exact solve reports, so the band ends at its positive part.
    low = np.where(band.low > 0, band.low, band.mean) if logarithmic else band.low
    axes.fill_between(band.x, low, band.high, color=style["color"], alpha=0.18, linewidth=0)
    return True


def _marker(curve: Curve) -> str:
    """A single finite point is invisible as a line."""
    return "o" if np.isfinite(curve.y).sum() <= 12 else ""


def _set_scales(axes: "Axes", panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    # Within a factor of four a logarithmic axis can be left without a single tick.
    if panel.logarithmic and axes.dataLim.ymax > 4 * axes.dataLim.minposy:
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=8))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10], integer=panel.integer))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))


def _draw_legend(figure: "Figure", grid: Sequence["Axes"], variants: Sequence[str]) -> None:
    lines = [line for axes in grid for line in axes.get_lines()]
    handles = {str(line.get_label()): line for line in lines if line.get_label() in variants}
    shown = [variant for variant in variants if variant in handles]
    if shown:
        legend = figure.legend(
            [handles[variant] for variant in shown],
            shown,
            loc="outside upper left",
            ncols=min(len(shown), 6),
            frameon=False,
        )
        for text in legend.get_texts():
            text.set_color(TEXT)


def _embeddable(document: str) -> str:
    """The drawing without XML prologue and namespaces, free in width, coloured like the text around it.

    Identifiers that nothing inside refers to are dropped: matplotlib repeats them in every drawing.
    """
    body = document[document.index("<svg") :]
    view_box = re.search(r'viewBox="([^"]+)"', body)
    assert view_box is not None
    body = re.sub(r"^<svg\b[^>]*>", f'<svg viewBox="{view_box[1]}" aria-hidden="true">', body, count=1)
    referred = set(re.findall(r"#([\w.-]+)", body))
    body = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in referred else "", body)
    body = re.sub(r"<style[^>]*>.*?</style>", "", body, flags=re.S)
    return body.replace("xlink:href", "href").replace(TEXT, "currentColor").strip()
