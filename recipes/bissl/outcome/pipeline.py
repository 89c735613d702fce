"""All stages of all arms in sequence, and what their tests amount to."""

import math
from typing import Any

from ...experiment.artifacts import Artifact
from ..settings import compatibility
from ..settings.arms import arm_of
from ..settings.config import Config
from ..settings.plan import make_plan
from ..training.context import Context
from ..training.stages import bissl, finetune, head, pretext
from .summary import ArmResult, assemble, environment

EQUAL_TIME = "baseline-time"


def run_pipeline(context: Context) -> dict[str, list[Artifact]]:
    """All stages of all arms; the fine-tuned artifacts of each arm, one for each seed."""
    config = context.config
    repeats = config.pipeline_seeds
    tested: dict[str, list[Artifact]] = {arm: [] for arm in config.arms}
    for seed in [config.seed + i for i in range(repeats or 1)]:
        weights: dict[str, Artifact | None] = {}
        # The arm of equal time is as long as others took.
        for arm in sorted(config.arms, key=lambda name: name == EQUAL_TIME):
            weights[arm] = pretrain(context.at(arm, seed), weights)
            tuning = [seed] if repeats else [config.seed + i for i in range(config.seeds)]
            tested[arm] += [finetune.run(context.at(arm, s), weights[arm]) for s in tuning]
    return tested


def pretrain(context: Context, made: dict[str, Artifact | None]) -> Artifact | None:
    """What the context's arm fine-tunes, None for random weights; `made` holds those of arms before it."""
    arm = arm_of(context.arm)
    if arm.start == "random":
        return None
    weights = pretext.run(context, steps=_equal_time(context, made) if context.arm == EQUAL_TIME else None)
    if arm.then == "bissl":
        return bissl.run(context, head.run(context, weights))
    return pretext.restart(context, weights) if arm.then == "restart" else weights


def _equal_time(context: Context, made: dict[str, Artifact | None]) -> int:
    """Pretext steps of the baseline in the seconds of the BiSSL arm."""
    method, baseline = made["bissl"], made["baseline"]
    assert method is not None, "it has weights"
    assert baseline is not None, "it has weights"
    # Steps that fit heads to given weights come before, and are as many again.
    fitting = (
        baseline.info["pretext_steps"] - make_plan(context.config, "baseline", len(context.data.pretext), 0).pretext
    )
    steps = baseline.info["pretext_steps"] * method.info["seconds"] / baseline.info["seconds"]
    return max(1, round(steps) - fitting)


def summarise(context: Context, tested: dict[str, list[Artifact]]) -> dict[str, Any]:
    """The content of results.json."""
    config = context.config
    first = tested["bissl"][0].info
    arms = {}
    for arm, artifacts in tested.items():
        infos = [artifact.info for artifact in artifacts]
        metrics = {name: [_number(info["test"][name]) for info in infos] for name in first["higher_is_better"]}
        seconds = sum(info["seconds"] for info in infos) / len(infos)
        # Where only fine-tuning is repeated, all start from the one bilevel stage of the first seed.
        stages = infos[: config.pipeline_seeds or 1]
        solves = {info["seed"]: info["solves"] for info in stages if info["solves"]}
        arms[arm] = ArmResult(metrics, infos[0]["pretext_steps"], infos[0]["label_steps"], seconds, solves)
    results = assemble(
        config.preset,
        [artifact.info["seed"] for artifact in tested["bissl"]],
        "pipeline" if config.pipeline_seeds else "finetune",
        first["primary_metric"],
        arms,
        environment(context.device),
        higher_is_better=first["higher_is_better"],
    )
    results["notes"] = notes(config, context)
    return results


def notes(config: Config, context: Context) -> list[str]:
    """What a reader of the table must know."""
    sets = context.data.downstream
    lines = [
        f"data: {len(context.data.pretext)} pretext images without labels; {len(sets.train)} labelled for training, "
        f"{len(sets.val)} to choose the epoch by, {len(sets.test)} for the test",
        "test accuracy is that of the best validation epoch's weights; steps and seconds are those of one repeat",
        "weight decay of the lower optimizer is outside the lower objective, so its stationarity does not reach 0",
    ]
    controls = [arm for arm in config.arms if arm not in ("bissl", "baseline", "scratch")]
    lines += [f"arm {arm}: {_meaning(config, arm)}" for arm in controls]
    tasks = config.pretext_task().describe() + config.downstream_task(sets.train.classes).describe()
    return lines + tasks + compatibility.describe(config)


def _meaning(config: Config, arm: str) -> str:
    changes = config.variants.get(arm)
    if changes is None:
        return arm_of(arm).meaning
    return "bissl with " + ", ".join(f"{name} = {value}" for name, value in changes.items())


def _number(value: float | None) -> float:
    """A recorded value, NaN where null stands for one that was not finite."""
    return math.nan if value is None else value
