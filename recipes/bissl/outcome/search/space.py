"""What the search looks for: which fields of the configuration, and from which ranges."""

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel

from ....experiment.errors import ConfigError
from ....experiment.search.space import Space, Trial, grid, log_uniform, nested, probes
from ....experiment.terminal import command_line
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
    idle, known = _idle(stage, variant, given=given), set(_names(config))
    for field, distribution in space.items():
        section = field.partition(".")[0]
        if section in FIXED:
            raise ConfigError(f"--space: {field} is not searched: {FIXED[section]}")
        for value in probes(distribution):
            try:
                changed = build_config(config, nested({field: value}))
            except ConfigError as error:
                if field not in known:
                    raise ConfigError(_unknown(field, known - FIXED.keys())) from error
                raise ConfigError(f"--space: {error}") from error
            if config.data.cache is not None and _views(changed) != _views(config):
                raise ConfigError(
                    f"--space: {field} changes the sizes of views, for which pictures were reduced in data.cache; set "
                    "data.cache to null"
                )
        reason = next((why for name, why in idle.items() if f"{field}.".startswith(f"{name}.")), None)
        if reason is not None:
            raise ConfigError(f"--space: {field} changes no trial: {reason}; leave it out")


def _names(config: Config) -> Iterator[str]:
    """All fields, nested ones joined by dots, and the sections that they are in."""
    yield from _names_of(config)
    for section, task in (("pretext", config.pretext_task()), ("downstream", config.downstream_task(("a", "b")))):
        yield from (f"{section}.options.{name}" for name in type(task).model_fields)


def _names_of(section: BaseModel) -> Iterator[str]:
    for name in type(section).model_fields:
        yield name
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from (f"{name}.{inner}" for inner in _names_of(value))


def _unknown(field: str, known: set[str]) -> str:
    """The message about a field that there is not, with those that may be meant: of the same last name, or similar."""
    last = field.rpartition(".")[2]
    near = sorted(name for name in known if name.rpartition(".")[2] == last)
    near = near or difflib.get_close_matches(field, sorted(known), n=3)
    meant = f"there is {' and '.join(near)}; " if near else ""
    return f"--space: {field}: unknown field; {meant}`{command_line()} --help` lists all"


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
