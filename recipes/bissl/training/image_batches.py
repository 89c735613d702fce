"""A run's images as batches, for training and for evaluation."""

from typing import Any

import torch
from torch import Tensor

from bilevel.distributed import shard_sizes, world_size
from bilevel.training import BatchStack, derive_seed

from ...experiment.errors import ConfigError
from ...vision.imagesets import ImageSet
from ...vision.shards import views_of_shard
from ..tasks.base import DownstreamTask, PretextTask
from .compute import Computing
from .datasets import Datasets
from .repeat import Repeat

LOWER_DATA = "bissl lower"
"""Purpose of the lower level's batches: a restart without an upper level sees the same ones."""

PRETEXT_IMAGES = {"pretext", "image_size", "pretext_limit", "test_fraction", "split_seed"}
"""Fields of the section `data` that decide which the pretext images are."""


class Batches:
    """The batches of one repeat, on the device: a function of its settings and its seed."""

    def __init__(self, repeat: Repeat, data: Datasets, computing: Computing) -> None:
        self.settings, self.seed = repeat.settings, repeat.seed
        self.data, self.computing = data, computing

    def pretext(self, task: PretextTask, purpose: str, fraction: float = 1.0) -> BatchStack:
        """Batches of a random `fraction` of the pretext images, the smaller last one of an epoch included.

        Args:
            purpose: what they are for; another purpose shuffles them in another order.
        """
        images = self.data.to_device("pretext", self.computing)
        transform = views_of_shard(task.transform(), type(task).__name__)
        count = round(fraction * len(images))
        what = "pretext images" if fraction == 1.0 else f"pretext images (bissl.pretext_fraction={fraction:g})"
        size = check_batch_size("pretext.batch_size", self.settings.pretext.batch_size, count, what)
        order = torch.Generator().manual_seed(derive_seed(self.settings.data.split_seed, "pretext fraction"))
        members = None if count == len(images) else torch.randperm(len(images), generator=order)[:count]

        def load(indices: Tensor, seed: int) -> Any:
            indices = indices if members is None else members[indices]
            chosen = images.images[indices.to(images.images.device)]
            return self.computing.move(transform(chosen, torch.Generator().manual_seed(seed)))

        self._check_shards("pretext.batch_size", size, count, self.settings.compute.micro_batch)
        return BatchStack(count, size, load, seed=derive_seed(self.seed, purpose), drop_last=count % size == 1)

    def labelled(self, task: DownstreamTask, purpose: str) -> BatchStack:
        """Batches of the labelled training images."""
        images = self.data.to_device("train", self.computing)
        transform = views_of_shard(task.transform(train=True), type(task).__name__)
        count, wanted = len(images), self.settings.downstream.batch_size
        size = check_batch_size("downstream.batch_size", wanted, count, "labelled images")
        self._check_shards("downstream.batch_size", size, count, None)
        labels = images.labels
        assert labels is not None

        def load(indices: Tensor, seed: int) -> Any:
            generator, chosen = torch.Generator().manual_seed(seed), indices.to(images.images.device)
            return self.computing.move(transform(images.images[chosen], labels[chosen], generator))

        return BatchStack(count, size, load, seed=derive_seed(self.seed, purpose), drop_last=count % size == 1)

    def evaluation(self, images: ImageSet, task: DownstreamTask) -> list[Any]:
        """The whole set in order, in the evaluation view."""
        transform, size = task.transform(train=False), self.settings.downstream.eval_batch_size
        labels, generator = images.labels, torch.Generator()
        assert labels is not None
        return [
            self.computing.move(transform(images.images[i : i + size], labels[i : i + size], generator))
            for i in range(0, len(images), size)
        ]

    def _check_shards(self, field_name: str, size: int, count: int, chunk: int | None) -> None:
        """Refuse batches of `size` of `count` images, and an epoch's last one, whose parts are too small for BatchNorm.

        Raises:
            ConfigError: naming the part.
        """
        ranks, least = world_size(), 2 if self.settings.compute.batch_norm == "local" else 1
        # A last batch of one image has no negatives: nothing to contrast, no batch statistics. It is left out.
        rest = 0 if count % size == 1 else count % size
        shards = {part for batch in (size, rest) if batch for part in shard_sizes(batch)}
        if ranks > 1 and min(shards) < least:
            raise ConfigError(
                f"{field_name}: {ranks} processes leave one of them {min(shards)} images of a batch of {size} or of an "
                f"epoch's last one, of {rest or size}; it needs {least}. Choose another size, or fewer processes"
            )
        if chunk is not None and any(shard % chunk == 1 for shard in shards):
            raise ConfigError(
                f"compute.micro_batch: chunks of {chunk} leave a single image of a batch of {size} or of an epoch's "
                f"last one, of {rest or size}; BatchNorm needs two, choose another size"
            )


def check_batch_size(field_name: str, size: int, available: int, what: str) -> int:
    """`size`, if there are as many images.

    Raises:
        ConfigError: there are not.
    """
    if size > available:
        raise ConfigError(f"{field_name}: {size} is larger than the data, {available} {what}; reduce it")
    return size
