"""What every stage needs besides its artifact."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from bilevel import BatchStack
from bilevel.distributed import rank, shard_sizes, world_size
from bilevel.training import TrackerError, derive_seed

from ...experiment.artifacts import ArtifactStore
from ...experiment.errors import ConfigError
from ...experiment.events import StageEvents
from ...experiment.folder.run_folder import TRACKING
from ...experiment.tracking import make_trackers
from ...vision.imagesets import DownstreamSets, ImageSet
from ...vision.shards import views_of_shard
from ...vision.sources.loading import load_downstream, load_pretext
from ..settings.config import Config
from ..tasks.base import DownstreamTask, PretextTask
from .compute import Computing

LOWER_DATA = "bissl lower"
"""Purpose of the lower level's batches: a restart without an upper level sees the same ones."""


class Datasets:
    """The run's images, read once, when first needed."""

    def __init__(self, config: Config) -> None:
        self.config = config.data
        self._on_device: dict[str, ImageSet] = {}

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

    def read(self) -> None:
        """Read all of them now."""
        _ = self.pretext, self.downstream

    def to_device(self, part: Literal["pretext", "train"], computing: Computing) -> ImageSet:
        """The images of training batches where `computing` wants them, moved once."""
        if part not in self._on_device:
            images = self.pretext if part == "pretext" else self.downstream.train
            self._on_device[part] = computing.to_device(images)
        return self._on_device[part]


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
        """The same run for another arm, with the arm's own bilevel stage, and seed."""
        return replace(self, config=self.config.for_arm(arm), arm=arm, seed=seed)

    @property
    def computing(self) -> Computing:
        """How modules, batches and losses are computed with."""
        return Computing(self.config.compute, self.device)

    def writer(self, stage: str) -> StageEvents:
        """Where a stage's events go."""
        fields = {"stage": stage, "variant": self.arm, "seed": self.seed}
        folder, config = self.metrics_path.parent / TRACKING, self.config.model_dump(mode="json")
        try:
            trackers = (
                {} if rank() > 0 else make_trackers(self.config.tracking, folder, fields, config, project="bissl")
            )
        except TrackerError as error:
            raise ConfigError(f"tracking: {error}") from error
        return StageEvents(self.metrics_path, fields, trackers)

    def pretext_stack(self, task: PretextTask, purpose: str, fraction: float = 1.0) -> BatchStack:
        """Batches of a random `fraction` of the pretext images, the smaller last one of an epoch included."""
        images = self.data.to_device("pretext", self.computing)
        transform = views_of_shard(task.transform(), type(task).__name__)
        count = round(fraction * len(images))
        what = "pretext images" if fraction == 1.0 else f"pretext images (bissl.pretext_fraction={fraction:g})"
        size = check_batch_size("pretext.batch_size", self.config.pretext.batch_size, count, what)
        order = torch.Generator().manual_seed(derive_seed(self.config.data.split_seed, "pretext fraction"))
        members = None if count == len(images) else torch.randperm(len(images), generator=order)[:count]

        def load(indices: Tensor, seed: int) -> Any:
            indices = indices if members is None else members[indices]
            chosen = images.images[indices.to(images.images.device)]
            return self.computing.move(transform(chosen, torch.Generator().manual_seed(seed)))

        self._check_shares("pretext.batch_size", size, count, self.config.compute.micro_batch)
        return BatchStack(count, size, load, seed=derive_seed(self.seed, purpose), drop_last=count % size == 1)

    def labelled_stack(self, task: DownstreamTask, purpose: str) -> BatchStack:
        """Labelled training batches."""
        images = self.data.to_device("train", self.computing)
        transform = views_of_shard(task.transform(train=True), type(task).__name__)
        size = check_batch_size(
            "downstream.batch_size", self.config.downstream.batch_size, len(images), "labelled images"
        )
        self._check_shares("downstream.batch_size", size, len(images), None)
        labels = images.labels
        assert labels is not None

        def load(indices: Tensor, seed: int) -> Any:
            generator, chosen = torch.Generator().manual_seed(seed), indices.to(images.images.device)
            return self.computing.move(transform(images.images[chosen], labels[chosen], generator))

        return BatchStack(
            len(images), size, load, seed=derive_seed(self.seed, purpose), drop_last=len(images) % size == 1
        )

    def _check_shares(self, field_name: str, size: int, count: int, chunk: int | None) -> None:
        """Refuse batches of `size` of `count` images, and an epoch's last one, whose parts are too small for BatchNorm.

        Raises:
            ConfigError: naming the part.
        """
        ranks, least = world_size(), 2 if self.config.compute.batch_norm == "local" else 1
        # A last batch of one image has no negatives: nothing to contrast, no batch statistics. It is left out.
        rest = 0 if count % size == 1 else count % size
        shares = {part for batch in (size, rest) if batch for part in shard_sizes(batch)}
        if ranks > 1 and min(shares) < least:
            raise ConfigError(
                f"{field_name}: {ranks} processes leave one of them {min(shares)} images of a batch of {size} or of an "
                f"epoch's last one, of {rest or size}; it needs {least}. Choose another size, or fewer processes"
            )
        if chunk is not None and any(share % chunk == 1 for share in shares):
            raise ConfigError(
                f"compute.micro_batch: chunks of {chunk} leave a single image of a batch of {size} or of an epoch's "
                f"last one, of {rest or size}; BatchNorm needs two, choose another size"
            )

    def evaluation_batches(self, images: ImageSet, task: DownstreamTask) -> list[Any]:
        """The whole set, untransformed but for the evaluation view, in order, on the device."""
        transform, size = task.transform(train=False), self.config.downstream.eval_batch_size
        labels, generator = images.labels, torch.Generator()
        assert labels is not None
        return [
            self.computing.move(transform(images.images[i : i + size], labels[i : i + size], generator))
            for i in range(0, len(images), size)
        ]


def check_batch_size(field_name: str, size: int, available: int, what: str) -> int:
    """`size`, if there are as many images.

    Raises:
        ConfigError: there are not.
    """
    if size > available:
        raise ConfigError(f"{field_name}: {size} is larger than the data, {available} {what}; reduce it")
    return size
