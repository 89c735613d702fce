"""A run's images as batches, for training and for evaluation."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bilevel.distributed import shard_sizes, world_size
from bilevel.training import derive_seed

from ...experiment.errors import ConfigError
from ...vision.imagesets import ImageSet
from ...vision.pipeline.loader import Loader, UnderWay
from ...vision.pipeline.reduction import View
from ...vision.pipeline.stream import InOrder, PrefetchedStack, order_of
from ...vision.record.contents import Contents
from ...vision.shards import Rows, SharedTransform, evaluated_rows, of_all_ranks
from ..settings.sections import DataConfig
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

    def pretext(self, task: PretextTask, purpose: str, total: int, fraction: float = 1.0) -> PrefetchedStack[UnderWay]:
        """`total` batches of a random `fraction` of the pretext images, the smaller last one of an epoch included.

        Args:
            purpose: what they are for; another purpose shuffles them in another order.
        """
        images, views = self.data.pretext, task.random_views()
        count = round(fraction * len(images))
        what = "pretext images" if fraction == 1.0 else f"pretext images (bissl.pretext_fraction={fraction:g})"
        size = check_batch_size("pretext.batch_size", self.settings.pretext.batch_size, count, what)
        self._check_shards("pretext.batch_size", size, count, self.settings.compute.micro_batch)
        order = torch.Generator().manual_seed(derive_seed(self.settings.data.split_seed, "pretext fraction"))
        members = None if count == len(images) else torch.randperm(len(images), generator=order)[:count]
        loader = self._pretext_loader(task)
        transform = _shared(task)

        def begin(indices: Tensor, seed: int) -> UnderWay:
            chosen = indices if members is None else members[indices]
            return loader.begin(chosen, seed, transform.rows(len(chosen)))

        def finish(begun: UnderWay, seed: int) -> Any:
            made, _ = loader.finish(begun)
            batch = transform(len(begun.indices), made if views else made[0], _generator(seed))
            return self.computing.move(batch)

        return self._stack(loader, begin, finish, count, size, purpose, total)

    def pretext_sample(self, task: PretextTask, count: int) -> Any:
        """A batch of the first images: always the same images and the same draws."""
        images, views = self.data.pretext, task.random_views()
        loader = self._pretext_loader(task)
        chosen = torch.arange(min(count, len(images)))
        made, whole = loader.make(chosen), slice(0, len(chosen))
        batch = _shared(task).of(whole, len(chosen), made if views else made[0], _generator(0))
        return self.computing.move(batch)

    def labelled(self, task: DownstreamTask, purpose: str, total: int) -> PrefetchedStack[UnderWay]:
        """`total` batches of the labelled training images."""
        images = self.data.downstream.train
        count, wanted = len(images), self.settings.downstream.batch_size
        size = check_batch_size("downstream.batch_size", wanted, count, labelled_words(self.settings.data))
        self._check_shards("downstream.batch_size", size, count, None)
        loader = self._loader(images, (task.train_view() or task.image_size,))
        transform = _shared(task, train=True)

        def begin(indices: Tensor, seed: int) -> UnderWay:
            return loader.begin(indices, seed, transform.rows(len(indices)))

        def finish(begun: UnderWay, seed: int) -> Any:
            inputs, targets = self._labelled(loader, begun, images)
            batch = transform(len(begun.indices), inputs, targets, _generator(seed))
            return self.computing.move(batch)

        return self._stack(loader, begin, finish, count, size, purpose, total)

    def evaluation(self, images: ImageSet, task: DownstreamTask) -> InOrder[UnderWay]:
        """The whole set in order, in the evaluation view: pairs of this rank's `Rows` of inputs, and all targets."""
        loader, begin, finish = self._evaluated(images, task)
        return InOrder(len(images), self.settings.downstream.eval_batch_size, begin, finish, loader.give_up)

    def evaluation_inputs(self, images: ImageSet, task: DownstreamTask, indices: Tensor) -> Any:
        """Inputs of some images in the evaluation view; over several ranks, of its rows alone."""
        _, begin, finish = self._evaluated(images, task)
        return finish(begin(indices))[0].inputs

    def _evaluated(self, images: ImageSet, task: DownstreamTask) -> tuple[Loader, Any, Any]:
        loader = self._loader(images, (task.evaluation_view() or task.image_size,), on_device=False)
        transform = _shared(task, train=False)

        def begin(indices: Tensor) -> UnderWay:
            return loader.begin(indices, rows=evaluated_rows(len(indices)))

        def finish(begun: UnderWay) -> tuple[Rows, Any]:
            count = len(begun.indices)
            given = *self._labelled(loader, begun, images), torch.Generator()
            inputs, targets = self.computing.move(transform.of(begun.rows, count, *given))
            return Rows(inputs, count), of_all_ranks(targets, count, "evaluation targets")

        return loader, begin, finish

    def _labelled(self, loader: Loader, begun: UnderWay, images: ImageSet) -> tuple[Tensor, Tensor]:
        """Views and labels of a batch under way."""
        views, masks = loader.finish(begun)
        assert images.labels is not None, "the three labelled sets have labels"
        labels = images.labels[begun.indices[begun.rows]]
        return views[0], masks[0] if masks else self.computing.move(labels)

    def _pretext_loader(self, task: PretextTask) -> Loader:
        views = task.random_views() or (task.image_size,)
        return self._loader(self.data.pretext, views, digests=self.data.identity.contents("pretext"))

    def _loader(
        self, images: ImageSet, views: tuple[View, ...], on_device: bool = True, digests: Contents | None = None
    ) -> Loader:
        masks = images.labels if images.kind == "segmentation" else None
        array = self.data.on_device(images, self.computing) if on_device and masks is None else None
        transfer = self.computing.transfer
        return Loader(
            images.images, views, self.data.workers, transfer=transfer, masks=masks, array=array, digests=digests
        )

    def _stack(
        self, loader: Loader, begin: Any, finish: Any, count: int, size: int, purpose: str, total: int
    ) -> PrefetchedStack[UnderWay]:
        order = order_of(count, size, seed=derive_seed(self.seed, purpose), drop_last=count % size == 1)
        on_gpu = self.computing.device.type == "cuda"
        ahead = int(on_gpu) if loader.images.in_memory else self.settings.data.prefetch_factor
        send = loader.send if on_gpu else None
        return PrefetchedStack(
            order, begin, finish, loader.give_up, total=total, ahead=ahead, room=loader.room, send=send
        )

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


def _shared(task: PretextTask | DownstreamTask, **fixed: bool) -> SharedTransform:
    """The task's transform with some of its arguments."""
    plain = {PretextTask.transform, DownstreamTask.transform}
    return SharedTransform(partial(task.transform, **fixed), type(task).__name__, type(task).transform in plain)


def _generator(seed: int) -> torch.Generator:
    """What a task's own transform draws by: views have numbers of their own."""
    return torch.Generator().manual_seed(derive_seed(seed, "transform"))


def labelled_words(section: DataConfig) -> str:
    """What labelled images are called in a message, with the field that makes them few."""
    cap = section.labels_per_class
    return "labelled images" if cap is None else f"labelled images (data.labels_per_class={cap} of each class)"


def check_batch_size(field_name: str, size: int, available: int, what: str) -> int:
    """`size`, if there are as many images.

    Raises:
        ConfigError: there are not.
    """
    if size > available:
        raise ConfigError(f"{field_name}: {size} is larger than the data, {available} {what}; reduce it")
    return size
