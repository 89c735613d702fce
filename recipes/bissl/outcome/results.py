"""What the tests of a run amount to: the content of its results.json."""

import math
from typing import Any

import torch

from ...experiment.artifacts import Artifact
from ...experiment.command.environment import environment
from ..settings import compatibility
from ..settings.arms import METHOD, REQUIRED, SCRATCH, arm_of
from ..settings.config import Config
from ..training.costs import costs_of
from ..training.datasets import Datasets
from .summary import ArmResult, assemble


def summarise(
    tested: dict[str, list[Artifact]], config: Config, data: Datasets, device: torch.device
) -> dict[str, Any]:
    """The content of results.json, from the fine-tuned artifacts of each variant.

    Args:
        data: the images of the run, and `device`, where it computed: for the notes.
    """
    first = tested[METHOD][0].info
    arms = {}
    for arm, artifacts in tested.items():
        infos, costs = [artifact.info for artifact in artifacts], [costs_of(artifact) for artifact in artifacts]
        metrics = {name: [_number(info["test"][name]) for info in infos] for name in first["higher_is_better"]}
        seconds = sum(cost.seconds for cost in costs) / len(costs)
        # Where only fine-tuning is repeated, all start from the one bilevel stage of the first seed.
        stages = infos[: config.pipeline_seeds or 1]
        solves = {info["seed"]: info["solves"] for info in stages if info["solves"]}
        arms[arm] = ArmResult(
            *(metrics, costs[0].pretext_steps, costs[0].label_steps, seconds, solves),
            skipped_pretext_steps=max(cost.skipped_pretext_steps for cost in costs),
            skipped_label_steps=max(cost.skipped_label_steps for cost in costs),
        )
    results = assemble(
        config.preset,
        [artifact.info["seed"] for artifact in tested[METHOD]],
        "pipeline" if config.pipeline_seeds else "finetune",
        first["primary_metric"],
        arms,
        environment(device, ["torchvision"]),
        higher_is_better=first["higher_is_better"],
    )
    results["images"] = data.reading()
    results["notes"] = notes(config, data)
    return results


def notes(config: Config, data: Datasets) -> list[str]:
    """What a reader of the table must know."""
    sets = data.downstream
    lines = [
        f"data: {len(data.pretext)} pretext images without labels; {len(sets.train)} labelled for training, "
        f"{len(sets.val)} to choose the epoch by, {len(sets.test)} for the test",
        "test accuracy is that of the best validation epoch's weights; steps and seconds are those of one repeat",
        "weight decay of the lower optimizer is outside the lower objective, so its stationarity does not reach 0",
    ]
    controls = [arm for arm in config.arms if arm not in (*REQUIRED, SCRATCH)]
    lines += [f"arm {arm}: {_meaning(config, arm)}" for arm in controls]
    tasks = config.pretext_task(), config.downstream_task(sets.train.classes)
    of_tasks = [line for task in tasks for line in task.describe_views() + task.describe()]
    return lines + of_tasks + compatibility.describe(config)


def _meaning(config: Config, arm: str) -> str:
    changes = config.variants.get(arm)
    if changes is None:
        return arm_of(arm).meaning
    return f"{METHOD} with " + ", ".join(f"{name} = {value}" for name, value in changes.items())


def _number(value: float | None) -> float:
    """A recorded value, NaN where null stands for one that was not finite."""
    return math.nan if value is None else value
