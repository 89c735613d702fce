"""What every stage needs besides its artifact."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from bilevel.batches import BatchStack, derive_seed
from recipes.bissl.artifact import ArtifactStore
from recipes.bissl.config import Config, ConfigError
from recipes.bissl.data import load_downstream, load_pretext
from recipes.bissl.events import StageEvents
from recipes.bissl.imagesets import DownstreamSets, ImageSet
from recipes.bissl.tasks.base import DownstreamTask, PretextTask


class Datasets:
    """The run's images, read once, when first needed."""

    def __init__(self, config: Config) -> None:
        self.config = config.data

    @cached_property
    def pretext(self) -> ImageSet:
        """Images without labels."""
        c = self.config
        return load_pretext(
            c.pretext,
            image_size=c.image_size,
            root=c.root,
            download=c.download,
            limit=c.pretext_limit,
            split_seed=c.split_seed,
            test_fraction=c.test_fraction,
        )

    @cached_property
    def downstream(self) -> DownstreamSets:
        """Labelled train, val and test sets."""
        c = self.config
        return load_downstream(
            c.downstream,
            image_size=c.image_size,
            root=c.root,
            download=c.download,
            labels_per_class=c.labels_per_class,
            val_per_class=c.val_per_class,
            val_fraction=c.val_fraction,
            test_fraction=c.test_fraction,
            split_seed=c.split_seed,
        )


@dataclass(frozen=True)
class Context:
    """A run's configuration, data, place on disk and current arm.

    Attributes:
        arm, seed: of the pipeline that is running; events and artifacts carry them.
        device: where modules and batches live.
        metrics_path: the run's ``metrics.jsonl``.
    """

    config: Config
    device: torch.device
    store: ArtifactStore
    metrics_path: Path
    data: Datasets
    console: Console = field(default_factory=Console)
    arm: str = "bissl"
    seed: int = 0

    def at(self, arm: str, seed: int) -> "Context":
        """The same run for another arm and seed."""
        return replace(self, arm=arm, seed=seed)

    def writer(self, stage: str) -> StageEvents:
        """Where a stage's events go."""
        return StageEvents(self.metrics_path, {"stage": stage, "arm": self.arm, "seed": self.seed})

    def pretext_stack(self, task: PretextTask, purpose: str) -> BatchStack:
        """Pretext batches, the smaller last one of an epoch included."""
        images, transform = self.data.pretext, task.transform()
        size = check_batch_size("pretext.batch_size", self.config.pretext.batch_size, len(images), "pretext images")

        def load(indices: Tensor, seed: int) -> Any:
            return to_device(transform(images.images[indices], torch.Generator().manual_seed(seed)), self.device)

        # A last batch of one image has no negatives: nothing to contrast, no batch statistics.
        return BatchStack(
            len(images), size, load, seed=derive_seed(self.seed, purpose), drop_last=len(images) % size == 1
        )

    def labelled_stack(self, task: DownstreamTask, purpose: str) -> BatchStack:
        """Labelled training batches."""
        images, transform = self.data.downstream.train, task.transform(train=True)
        size = check_batch_size(
            "downstream.batch_size", self.config.downstream.batch_size, len(images), "labelled images"
        )
        labels = images.labels
        assert labels is not None

        def load(indices: Tensor, seed: int) -> Any:
            generator = torch.Generator().manual_seed(seed)
            return to_device(transform(images.images[indices], labels[indices], generator), self.device)

        return BatchStack(
            len(images), size, load, seed=derive_seed(self.seed, purpose), drop_last=len(images) % size == 1
        )

    def evaluation_batches(self, images: ImageSet, task: DownstreamTask) -> list[Any]:
        """The whole set, untransformed but for the evaluation view, in order, on the device."""
        transform, size = task.transform(train=False), self.config.downstream.eval_batch_size
        labels, generator = images.labels, torch.Generator()
        assert labels is not None
        return [
            to_device(transform(images.images[i : i + size], labels[i : i + size], generator), self.device)
            for i in range(0, len(images), size)
        ]


def to_device(batch: Any, device: torch.device) -> Any:
    """The same nested structure with its tensors on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(item, device) for item in batch)
    return batch


def check_batch_size(field_name: str, size: int, available: int, what: str) -> int:
    """`size`, if there are as many images.

    Raises:
        ConfigError: there are not.
    """
    if size > available:
        raise ConfigError(f"{field_name}: {size} is larger than the data, {available} {what}; reduce it")
    return size
