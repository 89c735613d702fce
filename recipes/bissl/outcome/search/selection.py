"""Which trial a search chooses: the best balance of a high validation score and a low validation loss."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ....experiment.errors import ConfigError

TOLERANCE = 0.5


@dataclass(frozen=True)
class TrialRecord:
    """What one trial came to.

    Attributes:
        trial: its number.
        status: "diverged" where a training loss, a gradient, or the validation score or loss was not finite.
        epoch: of the best validation score; None if diverged, as are `score` and `loss` (at that epoch).
        metric, higher_is_better: what `score` is; None where training diverged before any was known.
        values: all validation values of that epoch.
        steps, seconds: what it took.
        message: why it diverged.
    """

    trial: int
    lr: float
    weight_decay: float
    status: Literal["finished", "diverged"]
    epoch: int | None = None
    metric: str | None = None
    higher_is_better: bool | None = None
    score: float | None = None
    loss: float | None = None
    values: Mapping[str, float | None] | None = None
    steps: int | None = None
    seconds: float | None = None
    message: str | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON values of all fields."""
        return asdict(self)


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


def select(records: Sequence[TrialRecord], tolerance: float) -> Selection:
    """Among the trials within `tolerance` of the best score, the one of lowest validation loss; ties by number.

    The others follow by score, then loss, then number. `tolerance` has the unit of the metric (percentage points of an
    accuracy), its bound included.

    Raises:
        ConfigError: no trial finished, or they were scored by different metrics.

    Source: BiSSL paper, appendix B.1, "best balance of high accuracy and low loss", made explicit.
    """
    finished = [record for record in records if record.status == "finished"]
    diverged = tuple(sorted(record.trial for record in records if record.status == "diverged"))
    if not finished:
        raise ConfigError(
            f"search: none of {len(records)} trials finished with finite numbers, so that there is nothing to choose; "
            "lower --lr-range"
        )
    if len({(record.metric, record.higher_is_better) for record in finished}) > 1:
        names = ", ".join(sorted({str(record.metric) for record in finished}))
        raise ConfigError(f"search: the trials were scored by different metrics ({names}); use another --output-dir")

    def shortfall(record: TrialRecord) -> float:
        assert record.score is not None
        return best - record.score if record.higher_is_better else record.score - best

    scores = [record.score for record in finished if record.score is not None]
    best = max(scores) if finished[0].higher_is_better else min(scores)
    # Percentages of small sets are rounded: a difference of exactly the tolerance must count as within it.
    bound = tolerance + 1e-9
    near = [record for record in finished if shortfall(record) <= bound]
    far = [record for record in finished if shortfall(record) > bound]
    ranked = sorted(near, key=lambda r: (r.loss, r.trial)) + sorted(far, key=lambda r: (shortfall(r), r.loss, r.trial))
    return Selection(tuple(ranked), len(near), diverged)
