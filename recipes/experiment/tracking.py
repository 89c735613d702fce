"""TensorBoard and Weights & Biases beside a run's `metrics.jsonl`."""

import importlib.util
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from bilevel.training import TensorBoardLogger, Tracker, WandbLogger

from .errors import ConfigError


def check_installed(names: Collection[str]) -> None:
    """Before a run's folder is touched: that the packages of these trackers are there.

    Raises:
        ConfigError: one is not.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"tracking: the package {name} is not installed: pip install 'bilevel[{name}]'")


def make_trackers(
    names: Collection[str], folder: Path, stage: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Tracker]:
    """The trackers of one stage, by name: each stage of each variant and seed is a run of its own in the viewer.

    Args:
        names: of "tensorboard" and "wandb".
        folder: where they keep their files; all stages of a run share it.
        stage: "stage", "variant" and "seed".
        config: the run's configuration, shown with a run of W&B. Its project is WANDB_PROJECT, or "bissl".

    Raises:
        TrackerError: a package is not installed.
    """
    title = f"{stage['stage']}/{stage['variant']}/seed-{stage['seed']}"
    made: dict[str, Tracker] = {}
    if "tensorboard" in names:
        made["tensorboard"] = TensorBoardLogger(folder / "tensorboard" / title)
    if "wandb" in names:
        project = os.environ.get("WANDB_PROJECT", "bissl")
        settings = {**config, **stage}
        made["wandb"] = WandbLogger(
            folder / "wandb", project=project, name=title, group=folder.parent.name, config=settings
        )
    return made
