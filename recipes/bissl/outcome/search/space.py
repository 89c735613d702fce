"""What the search looks for: which fields of the configuration, and from which ranges."""

import math
from collections.abc import Mapping
from typing import Literal

from ....experiment.errors import ConfigError
from ....experiment.search.trials import Distribution, LogUniform, Trial, draw, grid
from ...settings.arms import METHOD, Rates
from ...settings.config import Config

LR_RANGE, WEIGHT_DECAY_RANGE = (1e-4, 1.0), (1e-5, 1e-2)
TRIALS = 200
SearchStage = Literal["finetune", "head"]

LR, WEIGHT_DECAY = "lr", "weight_decay"


def random_pairs(
    count: int = TRIALS,
    seed: int = 0,
    lr_range: tuple[float, float] = LR_RANGE,
    weight_decay_range: tuple[float, float] = WEIGHT_DECAY_RANGE,
) -> list[Trial]:
    """Pairs of learning rate and weight decay, log-uniform in both ranges.

    Raises:
        ConfigError: no trials, or a range that is not 0 < low <= high.

    Source: BiSSL paper, appendix B.1, "random search of 200 configurations".
    """
    if count < 1:
        raise ConfigError(f"--trials: must be at least 1, got {count}")
    space: dict[str, Distribution] = {}
    for field, option, ends in (
        (LR, "--lr-range", lr_range),
        (WEIGHT_DECAY, "--weight-decay-range", weight_decay_range),
    ):
        try:
            space[field] = LogUniform(*ends)
        except ValueError as error:
            raise ConfigError(f"{option}: {error}") from error
    return draw(space, count, seed)


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
    return grid({LR: [rate * p for p in powers], WEIGHT_DECAY: [decay * p for p in powers]})


def decided(stage: SearchStage, whose: Rates, values: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Section -> field -> value: what a trial's values stand for in the configuration.

    Stage "head" decides for the head's warm-up and the upper level, which share their values (paper, Table 3).
    """
    rate, decay = values[LR], values[WEIGHT_DECAY]
    if stage == "head":
        return {
            "head": {"lr": rate, "weight_decay": decay},
            "bissl": {"upper_lr": rate, "upper_weight_decay": decay},
        }
    prefix = "" if whose == METHOD else f"{whose}_"
    return {"finetune": {f"{prefix}lr": rate, f"{prefix}weight_decay": decay}}


def with_values(config: Config, changes: Mapping[str, Mapping[str, float]]) -> Config:
    """`config` with these fields, by section."""
    sections = {name: getattr(config, name).model_copy(update=dict(fields)) for name, fields in changes.items()}
    return config.model_copy(update=sections)
