"""The images of a run."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from ...experiment.folder.paths import user_path
from ...vision.imagesets import DownstreamSets, ImageSet
from ...vision.pictures.mapped import MappedImages
from ...vision.pipeline.picture_cache import PictureCache
from ...vision.pipeline.reduction import MARGIN, View
from ...vision.pipeline.workers import Workers, cores_to_spare
from ...vision.sources.loading import load_downstream, load_pretext
from ..settings.config import Config
from .compute import Computing


class Datasets:
    """A run's images, read once, when first needed.

    Args:
        config: which images, and what will be made of them.
        read_labelled: reads the labelled sets in another way, such as from a cache.
        workers: processes that read streamed images, in place of the section's number.
        dry: write no cache, but say in `planned` what it would take.
    """

    def __init__(
        self,
        config: Config,
        read_labelled: Callable[[], Any] | None = None,
        workers: int | None = None,
        *,
        dry: bool = False,
    ) -> None:
        self.config, self._read_labelled = config, read_labelled or self._load_labelled
        self.section = section = config.data
        self._cache = None if section.cache is None else PictureCache(user_path(section.cache))
        self._dry, self.planned = dry, list[str]()
        count = section.num_workers if workers is None else workers
        self.workers = Workers(cores_to_spare() if count is None else count)
        self._arrays: dict[int, tuple[ImageSet, Tensor | None]] = {}

    @cached_property
    def pretext(self) -> ImageSet:
        """Images without labels."""
        c = self.section
        images = load_pretext(
            c.pretext,
            root=c.root,
            download=c.download,
            limit=c.pretext_limit,
            split_seed=c.split_seed,
            test_fraction=c.test_fraction,
            evaluated=c.pretext == c.downstream,
            storage=c.storage,
        )
        return self._kept(images, self.config.pretext_views())

    @cached_property
    def downstream(self) -> Any:
        """Labelled train, val and test sets (`DownstreamSets`; a cache may lack the test set)."""
        return self._read_labelled()

    def read(self) -> None:
        """Read all of them now."""
        _ = self.pretext, self.downstream

    def on_device(self, images: ImageSet, computing: Computing) -> Tensor | None:
        """The pictures on the device where crops are made there, moved once; else None."""
        if id(images) not in self._arrays:
            # The set is kept, so that no other one gets its number.
            self._arrays[id(images)] = images, computing.on_device(images)
        return self._arrays[id(images)][1]

    def _load_labelled(self) -> Any:
        c = self.section
        sets = load_downstream(
            c.downstream,
            root=c.root,
            download=c.download,
            labels_per_class=c.labels_per_class,
            val_per_class=c.val_per_class,
            val_fraction=c.val_fraction,
            test_fraction=c.test_fraction,
            split_seed=c.split_seed,
            train_list=c.train_list,
            storage=c.storage,
        )
        if self._cache is None:
            return sets
        views = self.config.labelled_views(sets.train.classes)
        train, val, test = (self._kept(images, views) for images in (sets.train, sets.val, sets.test))
        return DownstreamSets(train, val, test, sets.indices)

    def _kept(self, images: ImageSet, views: Sequence[View]) -> ImageSet:
        """The same set with its pictures in the cache, if there is one and they are read from files."""
        if self._cache is None:
            return images
        if self._dry:
            plan = self._cache.plan(images.images, views, images.name)
            self.planned += [] if plan is None else [f"note: data.cache: {plan}"]
            return images
        kept = self._cache.kept(images.images, views, images.name)
        return ImageSet(kept, images.labels, images.classes, images.name)


def resolution(*sets: ImageSet) -> dict[str, float]:
    """What belongs to the key of a stage that reads these sets: that pictures come reduced from a cache, if they do."""
    kept = [images.images for images in sets]
    reduced = any(isinstance(images, MappedImages) and images.reduced for images in kept)
    return {"cache_margin": MARGIN} if reduced else {}
