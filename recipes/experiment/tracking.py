"""TensorBoard and Weights & Biases loggers for the stages of a run, beside its `metrics.jsonl`."""

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
    names: Collection[str], folder: Path, stage: Mapping[str, str | int], config: Mapping[str, Any], *, project: str
) -> dict[str, Tracker]:
    """The trackers of one stage, by name: each stage is a run of its own in the viewer.

    Args:
        names: of "tensorboard" and "wandb".
        folder: where they keep their files; all stages of a run share it.
        stage: fields that tell the stage from all others of the run. The title in the viewer is their values in order,
            numbers with their names, as in ``fit/first/seed-0``.
        config: the run's configuration, shown with a run of W&B.
        project: of the run in W&B, where WANDB_PROJECT does not name another.

    Raises:
        TrackerError: a package is not installed.
    """
    title = "/".join(value if isinstance(value, str) else f"{name}-{value}" for name, value in stage.items())
    made: dict[str, Tracker] = {}
    if "tensorboard" in names:
        made["tensorboard"] = TensorBoardLogger(folder / "tensorboard" / title)
    if "wandb" in names:
        made["wandb"] = WandbLogger(
            folder / "wandb",
            project=os.environ.get("WANDB_PROJECT", project),
            name=title,
            group=folder.parent.name,
            config={**config, **stage},
        )
    return made
