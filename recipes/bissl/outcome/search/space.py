"""What the search looks for: which fields of the configuration, and from which ranges."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from ....experiment.errors import ConfigError
from ....experiment.search.space import Space, Trial, grid, log_uniform, nested, probes
from ...settings.arms import METHOD, Rates, arm_of
from ...settings.config import Config, build_config

LR_RANGE, WEIGHT_DECAY_RANGE = (1e-4, 1.0), (1e-5, 1e-2)
TRIALS = 200
SearchStage = Literal["finetune", "head"]

LR, WEIGHT_DECAY = "lr", "weight_decay"


FIXED = {
    **dict.fromkeys(("preset", "paper_version", "compat"), "it says how other fields came about; search those"),
    **dict.fromkeys(("arms", "variants"), "a search has one arm; give --arm"),
    **dict.fromkeys(("seeds", "pipeline_seeds", "jobs"), "a trial is one repeat"),
    **dict.fromkeys(("device", "threads", "rank_timeout", "tracking"), "it does not decide what is trained"),
    "seed": "the best of several seeds is chance",
    "data": "trials are compared on the same images",
}
"""Fields and sections that no search decides, and why."""


def pair_space(
    lr_range: tuple[float, float] = LR_RANGE, weight_decay_range: tuple[float, float] = WEIGHT_DECAY_RANGE
) -> Space:
    """Learning rate and weight decay, log-uniform in both ranges.

    Raises:
        ConfigError: a range that is not 0 < low <= high.

    Source: BiSSL paper, appendix B.1, "random search of 200 configurations".
    """
    ranges = ((LR, "--lr-range", lr_range), (WEIGHT_DECAY, "--weight-decay-range", weight_decay_range))
    space = {}
    for field, option, ends in ranges:
        try:
            space[field] = log_uniform(*ends)
        except ValueError as error:
            raise ConfigError(f"{option}: {error}") from error
    return space


def check_space(space: Space, config: Config, stage: SearchStage, variant: str, *, given: bool) -> None:
    """Refuse a space of fields of the configuration of which one takes no such values, or changes no trial.

    Args:
        given: whether trials start from an artifact that is made already.

    Raises:
        ConfigError: naming the field and what is wrong.
    """
    idle = _idle(stage, variant, given=given)
    for field, distribution in space.items():
        section = field.partition(".")[0]
        if section in FIXED:
            raise ConfigError(f"--space: {field} is not searched: {FIXED[section]}")
        for value in probes(distribution):
            try:
                changed = build_config(config, nested({field: value}))
            except ConfigError as error:
                raise ConfigError(f"--space: {error}") from error
            if config.data.cache is not None and _views(changed) != _views(config):
                raise ConfigError(
                    f"--space: {field} changes the sizes of views, for which pictures were reduced in data.cache; set "
                    "data.cache to null"
                )
        reason = next((why for name, why in idle.items() if f"{field}.".startswith(f"{name}.")), None)
        if reason is not None:
            raise ConfigError(f"--space: {field} changes no trial: {reason}; leave it out")


def _idle(stage: SearchStage, variant: str, *, given: bool) -> dict[str, str]:
    """Sections and fields that change nothing in a trial, and why."""
    arm, idle = arm_of(variant), dict[str, str]()
    if stage == "head":
        idle |= dict.fromkeys(("bissl", "finetune"), "with --stage head a trial ends before")
    elif arm.then != "bissl":
        idle |= dict.fromkeys(("head", "bissl"), f"the arm {variant!r} has no such stage")
    if arm.start == "random":
        idle["pretext"] = f"the arm {variant!r} starts from random weights"
    if given:
        idle |= dict.fromkeys(("pretext", "model"), "what --from names is made already")
        if stage == "finetune":
            idle |= dict.fromkeys(("head", "bissl"), "what --from names is made already")
    return idle


def _views(config: Config) -> Any:
    return config.pretext_views(), config.labelled_views(("a", "b"))


def grid_around(centre: tuple[float, float], *, side: int, factor: float) -> tuple[Space, list[Trial]]:
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


def decided(stage: SearchStage, whose: Rates, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a trial's values stand for in the configuration, as nested tables.

    A pair at stage "head" stands for the head's warm-up and the upper level, which share it (paper, Table 3).
    """
    if set(values) != {LR, WEIGHT_DECAY}:
        return nested(values)
    rate, decay = values[LR], values[WEIGHT_DECAY]
    if stage == "head":
        return {
            "head": {"lr": rate, "weight_decay": decay},
            "bissl": {"upper_lr": rate, "upper_weight_decay": decay},
        }
    prefix = "" if whose == METHOD else f"{whose}_"
    return {"finetune": {f"{prefix}lr": rate, f"{prefix}weight_decay": decay}}
