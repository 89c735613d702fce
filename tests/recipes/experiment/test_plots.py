"""Drawings of curves: where values put them, axes, names, and colours that follow the order of variants."""

import math
import re

import numpy as np
import pytest

from recipes.experiment.plots import PALETTE, Panel, draw
from recipes.experiment.records import Band, Curve


def test_curves_are_drawn_where_their_values_put_them() -> None:
    points = Curve(np.arange(4.0), np.array([0.0, 1.0, math.nan, 1.0]))
    drawing = draw("x", [Panel("loss", "step", {"a": {0: points}})], ["a"], columns=1)
    assert drawing is not None
    assert drawing.not_finite == 1
    assert "clip-path" in drawing.svg
    assert drawing.svg.count("#2f7fd0") >= 2
    assert "loss" in drawing.svg
    assert "currentColor" in drawing.svg


@pytest.mark.parametrize(
    ("values", "tick"),
    [([1e-4, 1e-2, 1.0], "0.0001"), ([0.0, 1e-4, 1.0], "0.0001"), ([0.0, 0.0, 0.0], "0"), ([2.25, 2.3, 2.75], "2.3")],
)
def test_logarithmic_panels_have_readable_ticks(values: list[float], tick: str) -> None:
    points = Curve(np.arange(3.0), np.array(values))
    drawing = draw("x", [Panel("residual", "step", {"a": {0: points}}, logarithmic=True)], ["a"], columns=1)
    assert drawing is not None
    assert f">{tick}</text>" in drawing.svg


def test_colours_follow_the_order_of_all_variants() -> None:
    points = Curve(np.arange(3.0), np.arange(3.0))
    drawing = draw("x", [Panel("loss", "step", {"second": {0: points}})], ["first", "second"])
    assert drawing is not None
    assert PALETTE[1] in drawing.svg
    assert PALETTE[0] not in drawing.svg


def test_panels_without_values_draw_nothing_or_say_so() -> None:
    band = {"a": Band(*np.ones((4, 2)))}
    assert draw("x", [Panel("loss", "step")], ["a"]) is None
    drawing = draw("x", [Panel("loss", "step"), Panel("residual", "step", bands=band)], ["a"])
    assert drawing is not None
    assert drawing.svg.count("not recorded") == 1


def test_a_name_is_text_and_two_drawings_share_no_identifier() -> None:
    points = Curve(np.arange(3.0), np.arange(3.0))
    panel = Panel("loss", "step", {"<b>$x_1": {0: points}})
    drawings = [draw(name, [panel], ["<b>$x_1"]) for name in ("one", "two")]
    identifiers = [set(re.findall(r' id="([^"]+)"', drawing.svg)) for drawing in drawings if drawing is not None]
    assert len(identifiers) == 2
    assert all(identifiers)
    assert not identifiers[0] & identifiers[1]
    assert all("&lt;b&gt;$x_1" in drawing.svg for drawing in drawings if drawing is not None)
