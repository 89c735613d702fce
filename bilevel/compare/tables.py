"""Measured solvers as Markdown tables."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bilevel.compare.curves import to_tolerance
from bilevel.compare.measuring import Timing
from bilevel.linear import Status

Row = Mapping[str, Any]
Column = tuple[str, float]
"""Of the table of curves: "first" or "later" right-hand sides, and the relative error to get below."""

SUCCESSES = {status.name for status in Status if status.ok}
SUCCESSIVE_HEADER = ("solver", "products", "time in gradients", "median error", "largest error")


def number(value: float) -> str:
    """Two digits from 0.01 up to 100, else one and the power of ten."""
    if value == 0.0:
        return "0"
    if 0.01 <= abs(value) < 100.0:
        return f"{value:.2g}"
    return re.sub(r"e([+-])0*(\d)", lambda m: f"e{'-' if m[1] == '-' else ''}{m[2]}", f"{value:.0e}")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Header and rows in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def words(status: str) -> str:
    """The name of a `Status` as it stands in a sentence."""
    return status.lower().replace("_", " ")


def spread(timing: Timing) -> str:
    """Median and quartiles, these left out where they round to the median."""
    middle, low, high = (_plain(value) for value in (timing.median, timing.q1, timing.q3))
    return middle if low == high == middle else f"{middle} ({low} to {high})"


def spread_of(record: Mapping[str, float]) -> str:
    """As `spread`, from the kept numbers."""
    return spread(Timing((record["q1"], record["q1"], record["median"], record["q3"], record["q3"])))


def names(rows: Sequence[Row], key: str) -> list[Any]:
    """The different values under a key, in order."""
    return list(dict.fromkeys(row[key] for row in rows))


def row_of(rows: Sequence[Row], **where: object) -> Row | None:
    """The row with these values, None where there is none."""
    return next((row for row in rows if all(row[key] == value for key, value in where.items())), None)


def curves_header(columns: Sequence[Column]) -> list[str]:
    """Of the table of what each solver needs for the errors of the columns."""
    cells = [f"{use}, to {number(error)}: {what}" for use, error in columns for what in ("products", "gradients")]
    return ["solver", *cells, "smallest error"]


def curves(rows: Sequence[Row], system: str, columns: Sequence[Column]) -> list[list[str]]:
    """Products and gradients to the columns' errors, and the smallest one, of every solver on one system."""
    body = []
    for solver in names(rows, "solver"):
        cells = []
        for use, error in columns:
            row = row_of(rows, system=system, solver=solver, use=use)
            found = None if row is None else to_tolerance(row, error)
            cells += ["–", "–"] if found is None else [spread(found["products"]), spread(found["gradients"])]
        first = row_of(rows, system=system, solver=solver, use="first")
        if first is not None:
            body.append([solver, *cells, _smallest(first)])
    return body


def curves_tables(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """One table a system under its name."""
    header = curves_header(columns)
    return "\n\n".join(f"**{name}**\n\n{table(header, curves(rows, name, columns))}" for name in names(rows, "system"))


def successive(rows: Sequence[Row]) -> list[list[str]]:
    """Products of the first right-hand side and of each of the others, and what they came to."""
    body = []
    for row in rows:
        first, *others = row["products"]
        listed = f"{sum(row['products'])} = {' + '.join(map(str, [first, *others]))}" if others else str(first)
        remark = [words(status) for status in row["statuses"] if status not in SUCCESSES]
        time = spread_of(row["gradients"])
        body.append([row["solver"], listed, time, ", ".join([number(row["error"]), *remark]), number(row["worst"])])
    return body


def _smallest(row: Row) -> str:
    smallest = min(point["error"]["median"] for point in row["points"])
    status = row["points"][-1]["status"]
    return number(smallest) + ("" if status in SUCCESSES else f", {words(status)}")


def _plain(value: float) -> str:
    return f"{value:.3g}" if value < 1000.0 else f"{value:.0f}"
