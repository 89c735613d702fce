"""Bars of several workers in terminals of any width."""

import io
import re

import pytest
from rich.console import Console

from recipes.experiment.side_by_side.bars import Bars
from recipes.experiment.side_by_side.reporter import Reached

FIRST, SECOND = "pretext stage, seed 0", "bilevel stage, bissl, seed 1"


def lines(width: int) -> list[str]:
    """What a terminal of so many columns shows of two workers, from the last time that it was drawn."""
    output = io.StringIO()
    with Bars(Console(file=output, force_terminal=True, width=width, color_system=None)) as bars:
        bars.reached(0, Reached(FIRST, 3, 100))
        bars.reached(1, Reached(SECOND, 40, 100))
        output.truncate(0)
        bars._progress.refresh()
        drawn = output.getvalue()
    return [part.rstrip() for part in re.split(r"[\r\n]|\x1b\[[0-9;?]*[A-Za-z]|\x00", drawn) if part.strip()]


@pytest.mark.parametrize(
    ("width", "bar", "left", "elapsed"),
    [
        (200, 40, True, True),
        (80, 24, True, True),
        (60, 13, True, False),
        (56, 0, True, False),
        (46, 0, True, False),
        (38, 0, False, False),
    ],
)
def test_a_line_each_that_fits(width: int, bar: int, left: bool, elapsed: bool) -> None:
    first, second = lines(width)
    assert all(len(line) <= width for line in (first, second))
    assert first.startswith(FIRST)
    assert second.startswith(SECOND)
    assert "3/100" in first
    assert "40/100" in second
    # Two spaces around the bar, and one because 40 is as wide as 100.
    assert second.index("40/100") - len(SECOND) - 2 == (bar + 1 if bar else 0)
    assert bool(re.search("[\u2500-\u257f]", second)) == (bar > 0)
    assert ("-:--:--" in second) == left
    assert ("0:00:0" in second) == elapsed


def test_a_bar_goes_when_its_training_is_done() -> None:
    output = io.StringIO()
    with Bars(Console(file=output, force_terminal=True, width=40)) as bars:
        bars.reached(0, Reached(FIRST, 3, 100))
        bars.reached(0, Reached(FIRST, 100, 100))
        bars.ended(0)
        assert not bars._progress.tasks
