"""Tables of text, written as markdown and as LaTeX."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table as ConsoleTable
from rich.text import Text

from .terminal import printable

_LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
}


@dataclass(frozen=True)
class Table:
    """Cells of plain text under headings: the first `left` columns are words, the others numbers."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    title: str = ""


def mean_text(figure: Mapping[str, Any], form: str) -> str:
    """A figure of `statistics.over_repeats` as "mean ± spread", each in this format, and the interval "ci95" where it
    has one; "undefined" without a mean.
    """
    mean, std = figure["mean"], figure["std"]
    if mean is None:
        return "undefined"
    interval = "".join(f" [{low:{form}}, {high:{form}}]" for low, high in [figure["ci95"]]) if "ci95" in figure else ""
    return f"{mean:{form}}" + ("" if std is None else f" ± {std:{form}}") + interval


def figures_table(figures: Mapping[str, Any], what: str, title: str, headings: Mapping[str, tuple[str, str]]) -> Table:
    """A row a name, `what` above the names, and of the headings, each a title and a format, those that all have."""
    columns = [column for column in headings if all(column in one for one in figures.values())]
    titles, forms = zip(*(headings[column] for column in columns), strict=True)
    rows = [[name, *map(mean_text, [one[column] for column in columns], forms)] for name, one in figures.items()]
    return Table([what, *titles], rows, title=title)


def print_table(console: Console, table: Table) -> None:
    """Print a table on a terminal, whatever its cells hold."""
    shown = ConsoleTable(title=_shown(table.title))
    for place, heading in enumerate(table.headings):
        shown.add_column(_shown(heading), justify="left" if place < table.left else "right")
    for row in table.rows:
        shown.add_row(*map(_shown, row))
    console.print(shown)


def _shown(cell: str) -> Text:
    """A cell as it is: neither markup nor commands for the terminal."""
    return Text(printable(cell))


def markdown(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """The tables one below the other, then the notes as a list."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_markdown(cell).replace("|", r"\|") for cell in cells) + " |"

    parts = []
    for table in tables:
        rule = ["---"] * table.left + ["---:"] * (len(table.headings) - table.left)
        parts.append("\n".join([f"## {table.title}", "", line(table.headings), line(rule), *map(line, table.rows)]))
    parts.append("\n".join(f"- {_markdown(note)}" for note in notes))
    return "\n\n".join(parts) + "\n"


def latex(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """`table` environments to be included in a document; they need no package. The notes are a list below."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join(_latex(cell) for cell in cells) + r" \\"

    parts = []
    for table in tables:
        columns = "l" * table.left + "r" * (len(table.headings) - table.left)
        body = [line(table.headings), r"\hline", *map(line, table.rows)]
        parts.append(
            "\n".join(
                [
                    r"\begin{table}",
                    rf"\caption{{{_latex(table.title)}}}",
                    rf"\begin{{tabular}}{{{columns}}}",
                    *body,
                    r"\end{tabular}",
                    r"\end{table}",
                ]
            )
        )
    parts.append("\n".join([r"\begin{itemize}", *(rf"\item {_latex(note)}" for note in notes), r"\end{itemize}"]))
    return "\n\n".join(parts) + "\n"


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))


def _markdown(text: str) -> str:
    """Text without tags and escapes; a plain "<" before a number stays as it is."""
    return re.sub(r"\\|<(?=[A-Za-z/!?])", lambda match: "\\" + match[0], _one_line(text))


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in _one_line(text))
