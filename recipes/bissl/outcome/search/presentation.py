"""What a search came to, as files and as text."""

import json
from collections.abc import Mapping

from rich.table import Table

from bilevel.checkpoint import write_atomic

from ....experiment.search.trial_record import Scores, Selection, TrialRecord
from ....experiment.search.trials import title
from ....experiment.terminal import command_line
from .variant_search import Search

SELECTION, CHOSEN = "selection.json", "chosen.toml"
SHOWN = 10
SEEDS = 10
"""Repeats at the chosen pair (paper, appendix B.1)."""


def write_selection(search: Search, selection: Selection, tolerance: float) -> None:
    """Write ``selection.json``, all trials in the order of the rule, and ``chosen.toml``, a config file."""
    fields, scores = search.fields(selection.winner.trial.values), _scores(selection.winner)
    content = {
        "stage": search.stage,
        "arm": search.variant,
        "metric": scores.metric,
        "higher_is_better": scores.higher_is_better,
        "tolerance": tolerance,
        "trials": len(search.queue.trials),
        "within_tolerance": selection.within,
        "winner": selection.winner.to_json(),
        "config": fields,
        "ranking": [record.trial.number for record in selection.ranked],
        "runners_up": [record.to_json() for record in selection.ranked[1 : SHOWN + 1]],
        "diverged": list(selection.diverged),
    }
    write_atomic(search.directory / SELECTION, json.dumps(content, indent=1, allow_nan=False).encode())
    write_atomic(search.directory / CHOSEN, toml(fields, comment=selection.winner.describe()).encode())


def toml(fields: Mapping[str, Mapping[str, float]], *, comment: str) -> str:
    """A config file with these fields."""
    sections = [
        f"[{section}]\n" + "".join(f"{name} = {value!r}\n" for name, value in values.items())
        for section, values in fields.items()
    ]
    return f"# chosen by search: trial {comment}\n" + "\n".join(sections)


def options(fields: Mapping[str, Mapping[str, float]]) -> str:
    """The same fields as options of the command line."""
    return " ".join(
        f"--{section}.{name.replace('_', '-')}={value!r}"
        for section, values in fields.items()
        for name, value in values.items()
    )


def table(search: Search, selection: Selection) -> Table:
    """The winner and its runners-up."""
    done = len(selection.ranked) + len(selection.diverged)
    view = Table(title=f"{search.stage}, arm {search.variant}: {done} of {len(search.queue.trials)} trials done")
    fields = [title(field) for field in selection.winner.trial.values]
    for name in ("rank", "trial", *fields, f"val {_scores(selection.winner).metric}", "val loss", "epoch"):
        view.add_column(name, justify="right", no_wrap=True)
    for rank, record in enumerate(selection.ranked[: SHOWN + 1], start=1):
        scores = _scores(record)
        numbers = [f"{value:.4g}" for value in (*record.trial.values.values(), scores.score, scores.loss)]
        # Behind the line the score is too low to be chosen, whatever the loss.
        last = rank == selection.within
        view.add_row(str(rank), f"{record.trial.number:03d}", *numbers, str(scores.epoch), end_section=last)
    return view


def lines(search: Search, selection: Selection, tolerance: float) -> list[str]:
    """What to read below the table, and how to go on."""
    rule = f"{selection.within} within {tolerance:g} of the best {_scores(selection.winner).metric}, by validation loss"
    chosen = f"chosen: trial {selection.winner.describe()}; {rule}; {len(selection.diverged)} diverged"
    command = [
        f"{command_line()} --preset {search.config.preset} --artifacts {search.artifacts}",
        options(search.fields(selection.winner.trial.values)),
        *([f"--seeds {SEEDS}"] if search.stage == "finetune" else []),
    ]
    return [chosen, f"go on, with the other options of the search, by: {' '.join(command)}"]


def _scores(record: TrialRecord) -> Scores:
    assert record.scores is not None, "a ranked trial has finished"
    return record.scores
