"""What a comparison found, to print and to keep."""

import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bilevel.checkpoint import write_atomic
from bilevel.checks import check_path
from bilevel.compare.advice import Advice, advise, strict_error
from bilevel.compare.figure import NotDrawnError, picture
from bilevel.compare.tables import (
    SUCCESSIVE_HEADER,
    Column,
    curves,
    curves_header,
    successive,
    table,
)

REPORT, CURVES, PICTURE = "report.md", "curves.json", "picture.svg"
_WIDTH = 118


@dataclass(frozen=True)
class SolverReport:
    """The outcome of `compare_solvers`; ``print`` it for the advice and the tables.

    Attributes:
        figures: everything measured, as numbers, strings and None in dictionaries and lists: ``environment``,
            ``system`` (its name), ``facts``, ``curves`` (a row a solver and use, with the points), ``successive`` and
            ``cuts``, what the time did not suffice for.
    """

    figures: Mapping[str, Any]

    @cached_property
    def _advice(self) -> Advice:
        return advise(self.figures)

    @property
    def recommended(self) -> str | None:
        """The solver that gets to `target` for the fewest products, or the one with the smallest error if none does;
        None where the reference is not accurate enough to tell solvers apart."""
        return self._advice.recommended

    @property
    def target(self) -> float:
        """The relative error of x that is enough: the noise of the lower batches where it is known, else 1e-2."""
        return self._advice.target

    @property
    def advice(self) -> tuple[str, ...]:
        """What the figures say, a paragraph a string."""
        return self._advice.sentences

    def __str__(self) -> str:
        output = io.StringIO()
        console = Console(file=output, width=_WIDTH, highlight=False, markup=False, emoji=False)
        console.print(self._title())
        console.print(_conditions(self.figures["environment"]))
        for sentence in [*self.advice, *self._cuts()]:
            console.print(f"- {sentence}")
        for title, header, rows in self._tables():
            shown = Table(title=title, title_justify="left")
            for cell in header:
                shown.add_column(cell, overflow="fold")
            for row in rows:
                shown.add_row(*row)
            console.print(shown)
        return "\n".join(line.rstrip() for line in output.getvalue().splitlines())

    def markdown(self, *, picture: str = "") -> str:
        """The report as Markdown; `picture` is a line for the picture, or what stands in its place."""
        parts = [f"# {self._title()}", _conditions(self.figures["environment"]), "## In words"]
        parts.append("\n".join(f"- {sentence}" for sentence in [*self.advice, *self._cuts()]))
        for title, header, rows in self._tables():
            parts += [f"## {title}", *([picture] if picture else []), table(header, rows)]
            picture = ""
        parts += ["## How to read it", _READING]
        return "\n\n".join(parts) + "\n"

    def picture(self) -> str:
        """The curves as SVG, first and later right-hand sides.

        Raises:
            ValueError: matplotlib cannot be imported.
        """
        name, noise = self.figures["system"], self.figures["facts"]["noise"]
        floors = {} if noise is None or noise < 1e-9 else {name: noise}
        later = [name] if any(row["use"] == "later" for row in self.figures["curves"]) else []
        return picture(self.figures["curves"], noise=floors, later=later)

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> list[Path]:
        """Write report.md, curves.json and, where matplotlib is installed, picture.svg into a folder; their paths.

        Without matplotlib report.md says so in the picture's place.

        Args:
            overwrite: replace files of these names; other files in the folder stay.

        Raises:
            ValueError: the folder holds something already and `overwrite` is not set, or is a file.
            OSError: it cannot be written to.
        """
        place = check_folder(folder, overwrite=overwrite)
        files = {CURVES: json.dumps(_finite(self.figures), indent=1, allow_nan=False) + "\n"}
        try:
            files[PICTURE] = self.picture()
            line = f"![Relative error of every solver against products and against time]({PICTURE})"
        except NotDrawnError as error:
            line = f"The curves are in {CURVES}; {error}."
        files[REPORT] = self.markdown(picture=line)
        place.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_atomic(place / name, text.encode())
        if PICTURE not in files:
            # One of a former report would not be of these figures.
            (place / PICTURE).unlink(missing_ok=True)
        return [place / name for name in (REPORT, CURVES, PICTURE) if name in files]

    def _title(self) -> str:
        facts = self.figures["facts"]
        batches = f"{facts['batches']} lower {'batch' if facts['batches'] == 1 else 'batches'}"
        return f"Solvers on {self.figures['system']}: {facts['variables']:,} variables, {batches}"

    def _cuts(self) -> list[str]:
        cuts, seconds = self.figures["cuts"], self.figures["seconds"]
        return [f"The time of {seconds:g} seconds did not suffice for all: {'; '.join(cuts)}."] if cuts else []

    def _tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Title, header and rows."""
        rows, name = self.figures["curves"], self.figures["system"]
        strict = strict_error(self.figures["facts"])
        columns: list[Column] = [("first", self.target)]
        columns += [("later", self.target)] if any(row["use"] == "later" for row in rows) else []
        columns += [] if strict is None else [("first", strict)]
        found = [("Error against products and time", curves_header(columns), curves(rows, name, columns))]
        if self.figures["successive"]:
            count = self.figures["facts"]["right_hand_sides"]
            title = f"{count} right-hand side{'' if count == 1 else 's'} one after the other"
            found.append((title, list(SUCCESSIVE_HEADER), successive(self.figures["successive"])))
        return found


def check_folder(folder: str | os.PathLike[str], *, overwrite: bool, remedy: str = "pass overwrite=True") -> Path:
    """The folder as a path. Raises ValueError where it is a file, or holds something and may not be overwritten."""
    check_path("folder", folder)
    place = Path(folder)
    if place.exists() and not place.is_dir():
        raise ValueError(f"{place} is a file; name a folder")
    if not overwrite and place.is_dir() and any(place.iterdir()):
        raise ValueError(f"{place} holds files already; name another folder, or {remedy} to replace a report there")
    return place


def _conditions(machine: Mapping[str, Any]) -> str:
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    return (
        f"Measured on {machine['date']} with torch {machine['torch']}, Python {machine['python']}, "
        f"{machine['system']}, {machine['processor']}, {machine['cores']} cores, {threads}, device {machine['device']}."
    )


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_READING = f"""\
Errors are relative errors of x, A x = dF/dy being the system of one hypergradient, and products those with A over all
lower batches. Time is in gradients of the lower objective over the same batches (for a fixed point or a root, of half
the square of its residual); that of a first right-hand side includes the linearization. A later right-hand side finds
what a solver has kept in its state. Medians over the right-hand sides, with quartiles where these differ; a dash where
an error was not reached. Products are those of the first of the tried numbers of iterations that gets there. The
numbers are in {CURVES}."""
