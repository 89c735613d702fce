"""What the trials of a search came to, and which one is chosen."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .trials import Trial, title


@dataclass(frozen=True)
class Scores:
    """What a trial's training was worth.

    Attributes:
        metric, higher_is_better: what `score` is.
        score, loss: on validation data, finite, after epoch `epoch`.
        values: all validation values of that epoch, None where one is not finite.
        steps, seconds: what it took.
    """

    epoch: int
    metric: str
    higher_is_better: bool
    score: float
    loss: float
    values: Mapping[str, float | None]
    steps: int
    seconds: float


@dataclass(frozen=True)
class TrialRecord:
    """A trial that is done.

    Attributes:
        scores: None where it diverged: a loss, a gradient or a score was not finite.
        message: why it diverged.
    """

    trial: Trial
    scores: Scores | None = None
    message: str | None = None

    def to_json(self) -> dict[str, Any]:
        """All of it in one flat JSON object."""
        scores = dict.fromkeys(_SCORES) if self.scores is None else asdict(self.scores)
        status = "diverged" if self.scores is None else "finished"
        return {"trial": self.trial.number, **self.trial.values, "status": status, **scores, "message": self.message}

    def describe(self) -> str:
        """One line."""
        values = ", ".join(f"{title(field)} {value:.4g}" for field, value in self.trial.values.items())
        found, about = self.scores, f"{self.trial.number:03d}: {values}"
        if found is None:
            return f"{about}: diverged ({self.message})"
        return f"{about}: {found.metric} {found.score:.4g}, loss {found.loss:.4g} at epoch {found.epoch}"


_SCORES = tuple(field.name for field in fields(Scores))


def read_record(path: Path, trial: Trial) -> TrialRecord:
    """The record of a trial.

    Raises:
        ConfigError: it cannot be read, or is of other values.
    """
    remedy = "delete the file to repeat the trial"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        own = {name: content[name] for name in ("trial", *trial.values)}
        scores = {name: content[name] for name in _SCORES}
        found = Scores(**scores) if content["status"] == "finished" else None
        record = TrialRecord(trial, found, content["message"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is no record of a trial ({error}); {remedy}") from error
    if own != {"trial": trial.number, **trial.values}:
        raise ConfigError(f"{path} is of other values than trial {trial.number} of this search; {remedy}")
    return record


Rule = Callable[[Sequence[tuple[int, Scores]]], tuple[list[int], int]]
"""Ranks finished trials, given as (number, scores): their numbers, best first, and how many are as good as the best."""


@dataclass(frozen=True)
class Selection:
    """The trials in the order of the rule.

    Attributes:
        ranked: finished trials, best first; `within` of them are as good as the best by score.
        diverged: numbers of the others.
    """

    ranked: tuple[TrialRecord, ...]
    within: int
    diverged: tuple[int, ...]

    @property
    def winner(self) -> TrialRecord:
        """The chosen trial."""
        return self.ranked[0]


def select(records: Sequence[TrialRecord], rule: Rule) -> Selection:
    """The trials ranked by `rule`.

    Raises:
        ConfigError: no trial finished, or they were scored by different metrics.
    """
    finished = {record.trial.number: record for record in records if record.scores is not None}
    diverged = tuple(sorted(record.trial.number for record in records if record.scores is None))
    scores = [(number, record.scores) for number, record in finished.items() if record.scores is not None]
    if not scores:
        raise ConfigError(
            f"search: none of {len(records)} trials finished with finite numbers, so that there is nothing to choose; "
            "search lower values"
        )
    if len({(found.metric, found.higher_is_better) for _, found in scores}) > 1:
        names = ", ".join(sorted({found.metric for _, found in scores}))
        raise ConfigError(f"search: the trials were scored by different metrics ({names}); use another --output-dir")
    numbers, within = rule(scores)
    return Selection(tuple(finished[number] for number in numbers), within, diverged)
