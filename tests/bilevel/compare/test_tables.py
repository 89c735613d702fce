"""Measured solvers as tables."""

from typing import Any

import pytest

from bilevel.compare import Timing, curves, curves_header, names, number, spread, spread_of, successive, to_tolerance

POINTS = [
    {"errors": [0.5, 0.009], "products": [1, 2], "gradients": [3.0, 4.0], "status": "BUDGET", "error": {"median": 0.3}},
    {
        "errors": [0.01, 0.001],
        "products": [5, 6],
        "gradients": [7.0, 8.0],
        "status": "MIXED",
        "error": {"median": 0.01},
    },
]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (5.04e-9, "5e-9"), (1.0, "1"), (0.0123, "0.012"), (45.2, "45"), (4.1e12, "4e12"), (0.00999, "1e-2")],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_spread() -> None:
    assert spread(Timing((12.0, 12.0, 12.0))) == "12"
    assert spread(Timing((1.0, 2.0, 3.0, 4.0, 5.0))) == "3 (2 to 4)"
    assert spread_of({"median": 3.0, "q1": 2.0, "q3": 4.0}) == "3 (2 to 4)"


def test_to_tolerance() -> None:
    found = to_tolerance({"points": POINTS}, 0.01)
    assert found is not None
    assert (found["products"].samples, found["gradients"].samples) == ((5, 2), (7.0, 4.0))
    assert to_tolerance({"points": POINTS}, 0.005) is None


def test_curves() -> None:
    rows: list[dict[str, Any]] = [{"system": "s", "solver": "A", "use": "first", "points": POINTS}]
    columns = [("first", 0.01), ("later", 0.01)]
    header = curves_header(columns)
    assert header[1:4] == ["first, to 0.01: products", "first, to 0.01: gradients", "later, to 0.01: products"]
    assert curves(rows, "s", columns) == [["A", "3.5 (2.75 to 4.25)", "5.5 (4.75 to 6.25)", "–", "–", "0.01, mixed"]]
    assert names([*rows, *rows], "solver") == ["A"]


def test_successive() -> None:
    row = {"solver": "A", "error": 0.1, "worst": 0.2, "gradients": {"median": 1.0, "q1": 1.0, "q3": 1.0}}
    several = successive([{**row, "products": [3, 2], "statuses": ["BUDGET", "DIVERGED"]}])
    assert several == [["A", "5 = 3 + 2", "1", "0.1, diverged", "0.2"]]
    assert successive([{**row, "products": [3], "statuses": ["BUDGET"]}]) == [["A", "3", "1", "0.1", "0.2"]]
