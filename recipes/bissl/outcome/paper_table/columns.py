"""Sets the rows of Table 1 in columns: as a table of text, or as CSV with all digits."""

import csv
import io
from collections.abc import Sequence

from ....experiment.tables import Table
from ...settings.paper import Score
from ..wording import comparison_numbers, count_text, number_text, p_text
from .rows import Measured, Row

ABSENT = "–"


def main_table(rows: Sequence[Row]) -> Table:
    """BiSSL and the baseline, their difference, and the paper's figures."""
    headings = ("data", "metric", "test", "BiSSL", "baseline", "difference", "95% interval", "p", "p (Holm)", "seeds")
    cells = [
        [
            *(row.dataset, row.metric, _test(row), _score(row.bissl), _score(row.other)),
            *(*_compared(row), str(row.seeds), *_paper(row.paper)),
        ]
        for row in rows
    ]
    headings = (*headings, "paper: BiSSL", "paper: baseline", "paper: difference")
    return Table(headings, cells, left=3, title="BiSSL and the baseline")


def arms_table(rows: Sequence[Row], hours: str) -> Table:
    """Every arm in the primary metric, with its cost; `hours` is what its time is called."""
    headings = ("data", "arm", "metric", "score", "BiSSL − arm", "95% interval", "p", "p (Holm)")
    cells = [
        [
            *(row.dataset, row.arm, row.metric, _score(row.other), *_compared(row)),
            *(count_text(row.pretext_steps), count_text(row.label_steps), number_text(row.hours)),
        ]
        for row in rows
    ]
    headings = (*headings, "pretext steps", "label steps", hours)
    return Table(headings, cells, left=3, title="All arms, and what they cost")


def csv_text(rows: Sequence[Row]) -> str:
    """The rows with all digits; what is undefined is empty."""
    text = io.StringIO()
    records = [_record(row) for row in rows]
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


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
