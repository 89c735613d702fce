"""What a search came to, as files and as text."""

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bilevel.checkpoint import write_atomic

from ....experiment.search.trial_record import Scores, Selection, TrialRecord, value_text
from ....experiment.terminal import command_line
from .variant_search import Search

SELECTION, CHOSEN = "selection.json", "chosen.json"
SHOWN = 10
SEEDS = 10
"""Repeats at the chosen values (paper, appendix B.1)."""


def write_selection(search: Search, selection: Selection, tolerance: float) -> None:
    """Write ``selection.json``, all trials and their order by the rule, and ``chosen.json``, a config file."""
    fields, scores = search.fields(selection.winner.trial.values), _scores(selection.winner)
    every = sorted((*selection.ranked, *selection.others), key=lambda record: record.trial.number)
    content = {
        "stage": search.stage,
        "arm": search.variant,
        "metric": scores.metric,
        "higher_is_better": scores.higher_is_better,
        "tolerance": tolerance,
        "within_tolerance": selection.within,
        "winner": selection.winner.to_json(),
        "config": fields,
        "ranking": [record.trial.number for record in selection.ranked],
        "trials": [record.to_json() for record in every],
    }
    _write(search, SELECTION, content)
    _write(search, CHOSEN, fields)


def _write(search: Search, name: str, content: Any) -> None:
    write_atomic(search.directory / name, json.dumps(content, indent=1, allow_nan=False).encode())


def options(fields: Mapping[str, Any]) -> str:
    """Fields of a config as options of the command line."""
    given = []
    for name, value in fields.items():
        # Tables below a section are options of a task, which are given as JSON.
        inner = value.items() if isinstance(value, Mapping) else [(None, value)]
        for field, found in inner:
            option = name if field is None else f"{name}.{field}"
            text = found if isinstance(found, str) else json.dumps(found)
            given.append(shlex.quote(f"--{option.replace('_', '-')}={text}"))
    return " ".join(given)


def unfinished(records: Sequence[TrialRecord]) -> str:
    """How many trials did not finish, by how they ended."""
    counts = Counter(record.status for record in records)
    return ", ".join(f"{counts[status]} {status}" for status in sorted({"diverged", *counts}))


def table(search: Search, selection: Selection, console: Console) -> Table:
    """The winner and its runners-up: a column for each field where they fit on the console, else a line for each."""
    wide = _table(search, selection, columns=True)
    needed = console.measure(wide, options=console.options.update(max_width=10_000)).maximum
    return wide if needed <= console.width else _table(search, selection, columns=False)


def _table(search: Search, selection: Selection, *, columns: bool) -> Table:
    done = len(selection.ranked) + len(selection.others)
    view = Table(title=f"{search.stage}, arm {search.variant}: {done} of {search.plan.count} trials done")
    fields, metric = list(selection.winner.trial.values), _scores(selection.winner).metric
    for name in ("rank", "trial", *(fields if columns else []), f"val {metric}", "val loss", "epoch"):
        view.add_column(name, justify="right", no_wrap=True)
    if not columns:
        view.add_column("values", overflow="fold")
    for rank, record in enumerate(selection.ranked[: SHOWN + 1], start=1):
        scores = _scores(record)
        values = {field: value_text(value) for field, value in record.trial.values.items()}
        found = [value_text(scores.score), value_text(scores.loss), str(scores.epoch)]
        cells = [*values.values(), *found] if columns else [*found, "\n".join(map(" ".join, values.items()))]
        # Behind the line the score is too low to be chosen, whatever the loss.
        last = rank == selection.within
        view.add_row(str(rank), f"{record.trial.number:03d}", *map(escape, cells), end_section=last)
    return view


def lines(search: Search, selection: Selection, tolerance: float) -> list[str]:
    """What to read below the table, and how to go on."""
    rule = f"{selection.within} within {tolerance:g} of the best {_scores(selection.winner).metric}, by validation loss"
    chosen = f"chosen: trial {selection.winner.describe()}; {rule}; {unfinished(selection.others)}"
    command = [
        f"{command_line()} --preset {search.config.preset} --artifacts {search.artifacts}",
        options(search.fields(selection.winner.trial.values)),
        *([f"--seeds {SEEDS}"] if search.stage == "finetune" else []),
    ]
    return [chosen, f"go on, with the other options of the search, by: {' '.join(command)}"]


def _scores(record: TrialRecord) -> Scores:
    assert record.scores is not None, "a ranked trial has finished"
    return record.scores
