"""The images of a run."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from ...experiment.artifacts import Artifact
from ...experiment.folder.paths import user_path
from ...vision.errors import DataError
from ...vision.imagesets import DownstreamSets, ImageSet
from ...vision.pictures.mapped import MappedImages
from ...vision.pipeline.picture_cache import PictureCache
from ...vision.pipeline.reduction import MARGIN, View
from ...vision.pipeline.workers import Workers, cores_to_spare, share_of_budget
from ...vision.record.copies import comparable, without_copies
from ...vision.record.identity import Identity
from ...vision.record.reading import reading
from ...vision.sources.loading import load_downstream, load_pretext
from ...vision.sources.published.catalog import DATASETS
from ..settings.config import Config
from .compute import Computing

MADE_FROM = ("pretext_images", "labelled_images")
"""Facts of artifacts: source, digest and number of the images that a stage and those before it have read."""


class Datasets:
    """A run's images, read once, when first needed.

    Args:
        config: which images, and what will be made of them.
        read_labelled: reads the labelled sets in another way, such as from a cache.
        processes: such runs on this machine, which share its cores and memory; None: as many as torchrun has started.
        dry: write no cache, but say in `planned` what it would take.
    """

    def __init__(
        self,
        config: Config,
        read_labelled: Callable[[], Any] | None = None,
        processes: int | None = None,
        *,
        dry: bool = False,
    ) -> None:
        self.config, self._read_labelled = config, read_labelled or self._load_labelled
        self.section = section = config.data
        self._cache = None if section.cache is None else PictureCache(user_path(section.cache))
        self._dry, self.planned = dry, list[str]()
        count = cores_to_spare(processes) if section.num_workers is None else section.num_workers
        self.workers = Workers(count, share_of_budget(processes))
        self._arrays: dict[int, tuple[ImageSet, Tensor | None]] = {}

    @cached_property
    def identity(self) -> Identity:
        """Which images they are."""
        return Identity(lambda part: self.pretext if part == "pretext" else getattr(self.downstream, part))

    @property
    def _one_source(self) -> bool:
        """Whether pretext images come from the source of the labelled ones."""
        return self.section.pretext == self.section.downstream

    @property
    def pretext(self) -> ImageSet:
        """Images without labels, none of which is a copy of a test image."""
        return self._without_copies[0]

    @cached_property
    def _without_copies(self) -> tuple[ImageSet, dict[str, int]]:
        """Those, and how many are copies of "test" images, which are left out, and of "val" images alone."""
        try:
            sets = self.downstream
        except DataError:
            # A dry run goes without a published set that is still to be fetched.
            if not self._dry or self.section.downstream not in DATASETS:
                raise
            return self.read_pretext(), {"test": 0, "val": 0}
        return without_copies(self.read_pretext(), sets)

    def read_pretext(self) -> ImageSet:
        """Images without labels, read anew, with those that are copies of test images."""
        c = self.section
        images = load_pretext(
            c.pretext,
            root=c.root,
            download=c.download,
            limit=c.pretext_limit,
            split_seed=c.split_seed,
            test_fraction=c.test_fraction,
            evaluated=self._one_source,
            storage=c.storage,
        )
        return self._kept(images, self.config.pretext_views())

    @cached_property
    def downstream(self) -> Any:
        """Labelled train, val and test sets (`DownstreamSets`; a cache may lack the test set)."""
        return self._read_labelled()

    def read(self) -> None:
        """Read all of them now."""
        _ = self.downstream, self.pretext

    def reading(self) -> dict[str, Any]:
        """What is read, as JSON values: see `vision.record.reading`."""
        sets = self.downstream
        parts = {"pretext": self.pretext, "train": sets.train, "val": sets.val, "test": sets.test}
        copies, compared = self._without_copies[1], True
        if self._one_source:
            # The test set was left out by its place, and validation images are pretext images.
            copies = {"test": copies["test"]}
        else:
            compared = comparable(self.pretext.images, sets.test.images)
        return reading(parts, {**copies, **self.identity.copies()}, compared)

    def facts(self, parent: Artifact | None, *, pretext: bool, labelled: bool) -> dict[str, Any]:
        """What an artifact says about the images that it was made from, those of the stages before it included.

        Args:
            pretext, labelled: whether the stage itself reads them.
        """
        made = {} if parent is None else {name: parent.info[name] for name in MADE_FROM if name in parent.info}
        if pretext:
            facts = {"digest": self.identity.pretext, "images": len(self.pretext)}
            made[MADE_FROM[0]] = {"source": self.section.pretext, **facts}
        if labelled:
            count = sum(map(len, (self.downstream.train, self.downstream.val, self.downstream.test)))
            facts = {"digest": self.identity.labelled, "images": count}
            made[MADE_FROM[1]] = {"source": self.section.downstream, **facts}
        return made

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
        return ImageSet(kept, images.labels, images.classes, images.name, images.passed_over)


def resolution(*sets: ImageSet) -> dict[str, float]:
    """What belongs to the key of a stage that reads these sets: that pictures come reduced from a cache, if they do."""
    kept = [images.images for images in sets]
    reduced = any(isinstance(images, MappedImages) and images.reduced for images in kept)
    return {"cache_margin": MARGIN} if reduced else {}
