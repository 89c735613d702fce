"""The picture of the curves."""

from itertools import pairwise
from typing import Any

import pytest

from bilevel.compare import apart, picture

pytest.importorskip("matplotlib", reason="pictures need matplotlib")


def row(solver: str, use: str = "first", *errors: float) -> dict[str, Any]:
    points = [
        {
            "budget": k + 1,
            "error": {"median": error, "q1": error, "q3": error},
            "errors": [error],
            "products": [k + 1],
            "gradients": [2.0 * k + 1.0],
            "status": "BUDGET",
        }
        for k, error in enumerate(errors or (0.5, 0.1))
    ]
    return {"system": "some $system", "solver": solver, "use": use, "points": points}


def test_labels_stay_apart_and_inside() -> None:
    for wanted in ([1.4, 1.2, 0.1, 0.1, 0.1, -0.2], [0.5], [0.9, 0.5, 0.2], [0.0] * 11):
        placed = apart(wanted, 0.09)
        assert all(a - b >= 0.09 - 1e-12 for a, b in pairwise(placed))
        assert all(0.0 <= value <= 1.0 for value in placed)
    assert apart([0.9, 0.5, 0.2], 0.1) == [0.9, 0.5, 0.2]


def test_solvers_of_any_name_are_drawn() -> None:
    drawn = picture([row("CG"), row("one of mine $x"), row("Identity", "first", 0.3)], noise={}, later=[])
    assert all(text in drawn for text in ("some $system: first", ">CG<", "one of mine $x", ">Identity<"))
    assert "noise of the batches" not in drawn


def test_later_right_hand_sides_have_a_row_where_asked_for() -> None:
    rows = [row("CG"), row("CG", "later"), row("CG, recycled"), row("CG, recycled", "later")]
    without, drawn = (picture(rows, noise={"some $system": 0.2}, later=names) for names in ([], ["some $system"]))
    assert ("later right-hand sides" in without, "later right-hand sides" in drawn) == (False, True)
    # In the first right-hand side it lies on CG's line.
    assert (without.count("CG, recycled"), drawn.count("CG, recycled")) == (0, 2)
    assert drawn.count("noise of the batches") == 4
