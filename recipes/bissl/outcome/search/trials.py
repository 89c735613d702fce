"""The trials of a search, each a pair of learning rate and weight decay that its number and the seed alone decide."""

import math
from dataclasses import dataclass
from typing import Literal

from bilevel.training import derive_seed

from ....experiment.errors import ConfigError
from ...settings.config import Config

LR_RANGE, WEIGHT_DECAY_RANGE = (1e-4, 1.0), (1e-5, 1e-2)
TRIALS = 200
SearchStage = Literal["finetune", "head"]


@dataclass(frozen=True)
class Trial:
    """One pair to try."""

    number: int
    lr: float
    weight_decay: float


@dataclass(frozen=True)
class RandomPairs:
    """Pairs drawn independently, log-uniform in both ranges.

    Trial i's pair is a function of (seed, i): the set does not depend on who draws it, in which order, or on how many
    trials there are. With u, w uniform in [0, 1), from SHA-256 of the seed and i::

        lr = a (b / a)^u,   weight decay = c (d / c)^w

    Raises:
        ConfigError: no trials, or a range that is not 0 < low <= high.

    Source: BiSSL paper, appendix B.1, "random search of 200 configurations".
    """

    trials: int = TRIALS
    seed: int = 0
    lr_range: tuple[float, float] = LR_RANGE
    weight_decay_range: tuple[float, float] = WEIGHT_DECAY_RANGE

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ConfigError(f"--trials: must be at least 1, got {self.trials}")
        for option, (low, high) in (("--lr-range", self.lr_range), ("--weight-decay-range", self.weight_decay_range)):
            if not (0 < low <= high < math.inf):
                raise ConfigError(f"{option}: needs 0 < LOW <= HIGH, got {low:g} {high:g}")

    def trial(self, number: int) -> Trial:
        """The pair of one number."""
        rate = _log_uniform(self.lr_range, derive_seed(self.seed, "search", number, "lr"))
        decay = _log_uniform(self.weight_decay_range, derive_seed(self.seed, "search", number, "weight decay"))
        return Trial(number, rate, decay)

    def all(self) -> list[Trial]:
        """All pairs, by number."""
        return [self.trial(number) for number in range(self.trials)]


def _log_uniform(between: tuple[float, float], bits: int) -> float:
    """The point of the range, on a logarithmic scale, that 63 uniform bits say."""
    low, high = between
    return min(low * (high / low) ** (bits / 2**63), high)


def grid_around(centre: tuple[float, float], *, side: int, factor: float) -> list[Trial]:
    """`side` x `side` pairs around `centre`, neighbours `factor` apart in learning rate and in weight decay.

    Numbered row by row, from the lowest learning rate and weight decay on.

    Raises:
        ConfigError: a side that is not odd, so that the centre itself would be missing, a factor that is not above 1,
            a grid that is too large, or a weight decay of 0, which has no neighbours.
    """
    if not 1 <= side < 100 or side % 2 == 0:
        raise ConfigError(f"--grid-side: must be odd, so that the centre is among the pairs, and below 100, got {side}")
    if not 1 < factor < math.inf:
        raise ConfigError(f"--grid-factor: must be above 1, got {factor:g}")
    if (side // 2) * math.log10(factor) > 12:
        raise ConfigError(f"--grid-factor: {side} values {factor:g} apart span over 24 powers of ten; take less of one")
    rate, decay = centre
    if decay == 0:
        raise ConfigError(
            "--stage head: the weight decay that the grid is centred on is 0; give --finetune.baseline-weight-decay"
        )
    powers = [factor ** (k - side // 2) for k in range(side)]
    pairs = [(rate * p, decay * q) for p in powers for q in powers]
    return [Trial(number, *pair) for number, pair in enumerate(pairs)]


def rate_fields(stage: SearchStage, whose: Literal["bissl", "baseline", "scratch"]) -> list[tuple[str, str, str]]:
    """(section, field of the learning rate, field of the weight decay) of everything that a search decides.

    Stage "head" decides for the head's warm-up and the upper level, which share their values (paper, Table 3).
    """
    if stage == "head":
        return [("head", "lr", "weight_decay"), ("bissl", "upper_lr", "upper_weight_decay")]
    prefix = "" if whose == "bissl" else f"{whose}_"
    return [("finetune", f"{prefix}lr", f"{prefix}weight_decay")]


def with_pair(
    config: Config, trial: Trial, stage: SearchStage, whose: Literal["bissl", "baseline", "scratch"]
) -> Config:
    """`config` with the trial's pair where the search looks."""
    updates = {
        section: getattr(config, section).model_copy(update={rate: trial.lr, decay: trial.weight_decay})
        for section, rate, decay in rate_fields(stage, whose)
    }
    return config.model_copy(update=updates)
