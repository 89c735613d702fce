"""What the host reads of an accelerator, path by path, counted on a simulated one.

    python benchmarks/host_reads/run.py --json benchmarks/results/host_reads.json --docs docs/cost.md

A read is a number or a tensor that the host takes from the device: it waits until all that was queued is done. A copy
goes the other way. Both are counted, not timed: the same paths give the same counts on every machine. `PARTS` has a
table of the page each; what is done once for a problem (its curvature is examined) is not counted.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.host_reads import paths, vision
from benchmarks.host_reads.device import Crossing
from benchmarks.measuring import parser, show, write_json
from benchmarks.pages import table, update

Counts = dict[str, dict[str, int]]
"""By column: how many reads and copies."""


def counted(found: Mapping[str, Sequence[Crossing]]) -> Counts:
    """Numbers of crossings."""
    kinds = {name: Counter(crossing.kind for crossing in crossings) for name, crossings in found.items()}
    return {name: {"reads": kind["read"], "copies": kind["copy"]} for name, kind in kinds.items()}


def recipe(name: str) -> Counts:
    """Of one entry of `vision.PATHS`, whose parts have a row each."""
    return counted(vision.PATHS[name]())


def evaluation(name: str) -> Counts:
    """Of an evaluation with one metric and a loss: for every further batch, and whatever their number."""
    two, four = (counted({"": vision.evaluation(name, batches)})[""] for batches in (2, 4))
    batch = {kind: (four[kind] - two[kind]) // 2 for kind in two}
    return {"a batch": batch, "at the end": {kind: two[kind] - 2 * batch[kind] for kind in two}}


@dataclass(frozen=True)
class Part:
    """One table: what its first column is called, its rows and what counts in one, its other columns."""

    head: str
    rows: Sequence[str]
    count: Callable[[str], Counts]
    columns: Sequence[str]


PARTS: Mapping[str, Part] = {
    "products": Part(
        "provider",
        tuple(paths.PROVIDERS),
        lambda name: counted(paths.product(paths.PROVIDERS[name]())),
        ("linearize", "first product", "product", "cross term", "gradient"),
    ),
    "solves": Part(
        "solver",
        (*paths.FIXED, *paths.ADAPTIVE),
        lambda name: counted(paths.solved({**paths.FIXED, **paths.ADAPTIVE}[name])),
        ("first", "later", "between products"),
    ),
    "steps": Part(
        "method",
        tuple(paths.METHODS),
        lambda name: counted(paths.steps(paths.METHODS[name])[0]),
        ("lower", "first upper", "upper"),
    ),
    "evaluation": Part("metric", tuple(vision.METRICS), evaluation, ("a batch", "at the end")),
    "recipe": Part("part", tuple(vision.PATHS), recipe, ()),
}


def measure() -> dict[str, dict[str, Counts]]:
    """All counts, by part and row."""
    return {name: {row: part.count(row) for row in part.rows} for name, part in PARTS.items()}


def rows(name: str, counts: Mapping[str, Counts]) -> list[list[str]]:
    """The cells of one table; of the recipe, a row for each of the paths that an entry has."""
    columns = PARTS[name].columns
    if columns:
        return [[row, *(_cell(found.get(column)) for column in columns)] for row, found in counts.items()]
    return [[path, _cell(cell)] for found in counts.values() for path, cell in found.items()]


def _cell(found: Mapping[str, int] | None) -> str:
    if found is None:
        return ""
    copies = f" and {found['copies']} copies" if found["copies"] else ""
    return f"{found['reads']}{copies}"


def tables(figures: Mapping[str, Mapping[str, Counts]]) -> dict[str, str]:
    """The tables of the page."""
    return {f"reads of {name}": table(_header(name), rows(name, counts)) for name, counts in figures.items()}


def _header(name: str) -> list[str]:
    return [PARTS[name].head, *(PARTS[name].columns or ("reads",))]


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--docs", type=Path, help="write the tables into this page")
    options.add_argument("--from", type=Path, dest="source", help="take counts from this file instead of counting")
    given = options.parse_args(arguments)
    kept: Path | None = given.source
    figures = measure() if kept is None else json.loads(kept.read_text(encoding="utf-8"))
    write_json(given.json, figures)
    for name, counts in figures.items():
        show(f"Reads of {name}", _header(name), rows(name, counts))
    return 0 if given.docs is None else update(given.docs, tables(figures), check=False)


if __name__ == "__main__":
    sys.exit(main())
