"""Tables of text as markdown, LaTeX and HTML, and rows of a results table as text and as CSV."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ....experiment.terminal import printable
from ...settings.paper import Score
from ..results_table import comparison_numbers, count_text, number_text, p_text
from .rows import Measured, Row

ABSENT = "–"

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1400px; margin: 2rem auto; padding: 0 1.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.6rem 0; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid #8886; text-align: left; white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
"""

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
class Grid:
    """A table of text: the first `left` columns are words, the others numbers."""

    title: str
    headings: tuple[str, ...]
    rows: list[list[str]]
    left: int


def main_grid(rows: Sequence[Row]) -> Grid:
    """BiSSL and the baseline, their difference, and the paper's figures."""
    headings = ("data", "metric", "test", "BiSSL", "baseline", "difference", "95% interval", "p", "p (Holm)", "seeds")
    cells = [
        [
            *(row.dataset, row.metric, _test(row), _score(row.bissl), _score(row.other)),
            *(*_compared(row), str(row.seeds), *_paper(row.paper)),
        ]
        for row in rows
    ]
    return Grid(
        "BiSSL and the baseline",
        (*headings, "paper: BiSSL", "paper: baseline", "paper: difference"),
        cells,
        left=3,
    )


def arms_grid(rows: Sequence[Row], hours: str) -> Grid:
    """Every arm in the primary metric, with its cost; `hours` is what its time is called."""
    headings = ("data", "arm", "metric", "score", "BiSSL − arm", "95% interval", "p", "p (Holm)")
    cells = [
        [
            *(row.dataset, row.arm, row.metric, _score(row.other), *_compared(row)),
            *(count_text(row.pretext_steps), count_text(row.label_steps), number_text(row.hours)),
        ]
        for row in rows
    ]
    return Grid("All arms, and what they cost", (*headings, "pretext steps", "label steps", hours), cells, left=3)


def csv_text(rows: Sequence[Row]) -> str:
    """The rows with all digits; what is undefined is empty."""
    text = io.StringIO()
    records = [_record(row) for row in rows]
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def markdown(grids: Sequence[Grid], notes: Sequence[str]) -> str:
    """The tables one below the other, then the notes as a list."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_markdown(cell).replace("|", r"\|") for cell in cells) + " |"

    parts = []
    for grid in grids:
        rule = ["---"] * grid.left + ["---:"] * (len(grid.headings) - grid.left)
        parts.append("\n".join([f"## {grid.title}", "", line(grid.headings), line(rule), *map(line, grid.rows)]))
    parts.append("\n".join(f"- {_markdown(note)}" for note in notes))
    return "\n\n".join(parts) + "\n"


def latex(grids: Sequence[Grid], notes: Sequence[str]) -> str:
    """`table` environments to be included in a document; they need no package. The notes are a list below."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join(_latex(cell) for cell in cells) + r" \\"

    parts = []
    for grid in grids:
        columns = "l" * grid.left + "r" * (len(grid.headings) - grid.left)
        body = [line(grid.headings), r"\hline", *map(line, grid.rows)]
        parts.append(
            "\n".join(
                [
                    r"\begin{table}",
                    rf"\caption{{{_latex(grid.title)}}}",
                    rf"\begin{{tabular}}{{{columns}}}",
                    *body,
                    r"\end{tabular}",
                    r"\end{table}",
                ]
            )
        )
    parts.append("\n".join([r"\begin{itemize}", *(rf"\item {_latex(note)}" for note in notes), r"\end{itemize}"]))
    return "\n\n".join(parts) + "\n"


def html(grids: Sequence[Grid], notes: Sequence[str]) -> str:
    """A page that needs nothing but itself."""
    parts = [_html_table(grid) for grid in grids]
    parts.append("<ul>\n" + "\n".join(f"<li>{escape(note)}</li>" for note in notes) + "\n</ul>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>BiSSL: results</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _html_table(grid: Grid) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = ["" if place < grid.left else ' class="number"' for place in range(len(cells))]
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    body = "\n".join(f"<tr>{line('td', row)}</tr>" for row in grid.rows)
    return (
        f'<h2>{escape(grid.title)}</h2>\n<div class="scroll"><table>\n<thead><tr>{line("th", grid.headings)}</tr>'
        f"</thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _record(row: Row) -> dict[str, str | float | None]:
    c = row.comparison
    low, high = (None, None) if c is None or c.ci95 is None else c.ci95
    bissl, baseline = row.paper or ((None, None), (None, None))
    return {
        "dataset": row.dataset,
        "arm": row.arm,
        "metric": row.metric,
        "bissl_mean": row.bissl.mean,
        "bissl_std": row.bissl.std,
        "arm_mean": row.other.mean,
        "arm_std": row.other.std,
        "difference": c and c.difference,
        "ci95_low": low,
        "ci95_high": high,
        "test": c and c.test,
        "p_value": c and c.p_value,
        "p_holm": row.p_holm,
        "repeats": row.repeats,
        "seeds": row.seeds,
        "pretext_steps": row.pretext_steps,
        "label_steps": row.label_steps,
        "hours": row.hours,
        "paper_bissl_mean": bissl[0],
        "paper_bissl_std": bissl[1],
        "paper_baseline_mean": baseline[0],
        "paper_baseline_std": baseline[1],
        "notes": "; ".join(row.notes),
    }


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))


def _markdown(text: str) -> str:
    """Text without tags and escapes; a plain "<" before a number stays as it is."""
    return re.sub(r"\\|<(?=[A-Za-z/!?])", lambda match: "\\" + match[0], _one_line(text))


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in _one_line(text))


def _score(value: Measured) -> str:
    if value.mean is None:
        return "not finite"
    return number_text(value.mean) if value.std is None else f"{number_text(value.mean)} ± {number_text(value.std)}"


def _test(row: Row) -> str:
    return ABSENT if row.comparison is None else row.comparison.test


def _compared(row: Row) -> list[str]:
    """Difference, interval, p, and p after the correction."""
    if row.comparison is None:
        return [ABSENT] * 4
    difference, interval = comparison_numbers(row.comparison.model_dump())
    values = (row.comparison.p_value, row.p_holm)
    return [difference, interval, *(ABSENT if p is None else p_text(p).removeprefix("= ") for p in values)]


def _paper(scores: tuple[Score, Score] | None) -> list[str]:
    """BiSSL, the baseline and their difference as the paper prints them."""
    if scores is None:
        return [ABSENT] * 3
    (bissl, spread), (baseline, baseline_spread) = scores
    difference = f"{round(bissl - baseline, 1):+.1f}".replace("-", "−").replace("+0.0", "0.0").replace("−0.0", "0.0")
    return [f"{bissl} ± {spread}", f"{baseline} ± {baseline_spread}", difference]
