"""What the trials of a search came to, and which one is chosen."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from ..errors import ConfigError
from .space import Trial


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


Status = Literal["finished", "diverged", "pruned", "invalid"]
"""How a trial ended: with scores; a loss, a gradient or a score was not finite; it was given up on the way; its values
do not fit each other or what they are tried on."""


@dataclass(frozen=True)
class TrialRecord:
    """A trial that is done.

    Attributes:
        scores: None where it did not finish.
        message: why it did not.
    """

    trial: Trial
    status: Status
    scores: Scores | None = None
    message: str | None = None

    def to_json(self) -> dict[str, Any]:
        """All of it in one flat JSON object."""
        scores = dict.fromkeys(_SCORES) if self.scores is None else asdict(self.scores)
        about = {"trial": self.trial.number, **self.trial.values, "status": self.status}
        return {**about, **scores, "message": self.message}

    def describe(self) -> str:
        """One line."""
        values = ", ".join(f"{field} {value_text(value)}" for field, value in self.trial.values.items())
        found, about = self.scores, f"{self.trial.number:03d}: {values}"
        if found is None:
            return f"{about}: {self.status} ({self.message})"
        return f"{about}: {found.metric} {found.score:.4g}, loss {found.loss:.4g} at epoch {found.epoch}"


def value_text(value: Any, digits: int = 4) -> str:
    """A value as it is shown: a number in that many digits, null for None."""
    return f"{value:.{digits}g}" if isinstance(value, float) else "null" if value is None else str(value)


_SCORES = tuple(field.name for field in fields(Scores))


Rule = Callable[[Sequence[tuple[int, Scores]]], tuple[list[int], int]]
"""Ranks finished trials, given as (number, scores): their numbers, best first, and how many are as good as the best."""


@dataclass(frozen=True)
class Selection:
    """The trials in the order of the rule.

    Attributes:
        ranked: finished trials, best first; `within` of them are as good as the best by score.
        others: those that did not finish, by number.
    """

    ranked: tuple[TrialRecord, ...]
    within: int
    others: tuple[TrialRecord, ...]

    @property
    def winner(self) -> TrialRecord:
        """The chosen trial."""
        return self.ranked[0]


def select(records: Sequence[TrialRecord], rule: Rule) -> Selection:
    """The trials ranked by `rule`.

    Raises:
        ConfigError: no trial finished (how the first one ended is said), or they were scored by different metrics.
    """
    finished = {record.trial.number: record for record in records if record.scores is not None}
    others = sorted((record for record in records if record.scores is None), key=lambda record: record.trial.number)
    scores = [(number, record.scores) for number, record in finished.items() if record.scores is not None]
    if not scores:
        raise ConfigError(
            f"search: none of {len(records)} trials finished, so that there is nothing to choose; search other values. "
            f"Trial {others[0].describe()}"
        )
    if len({(found.metric, found.higher_is_better) for _, found in scores}) > 1:
        names = ", ".join(sorted({found.metric for _, found in scores}))
        raise ConfigError(f"search: the trials were scored by different metrics ({names}); use another --output-dir")
    numbers, within = rule(scores)
    return Selection(tuple(finished[number] for number in numbers), within, tuple(others))
