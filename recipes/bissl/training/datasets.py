"""The images of a run."""

from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

from ...vision.imagesets import ImageSet
from ...vision.sources.loading import load_downstream, load_pretext
from ..settings.sections import DataConfig
from .compute import Computing


class Datasets:
    """A run's images, read once, when first needed.

    Args:
        section: which images.
        read_labelled: reads the labelled sets in another way, such as from a cache.
    """

    def __init__(self, section: DataConfig, read_labelled: Callable[[], Any] | None = None) -> None:
        self.section, self._read_labelled = section, read_labelled or self._load_labelled
        self._on_device: dict[str, ImageSet] = {}

    @cached_property
    def pretext(self) -> ImageSet:
        """Images without labels."""
        c = self.section
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
    def downstream(self) -> Any:
        """Labelled train, val and test sets (`DownstreamSets`; a cache may lack the test set)."""
        return self._read_labelled()

    def read(self) -> None:
        """Read all of them now."""
        _ = self.pretext, self.downstream

    def to_device(self, part: Literal["pretext", "train"], computing: Computing) -> ImageSet:
        """The images of training batches where `computing` wants them, moved once."""
        if part not in self._on_device:
            images = self.pretext if part == "pretext" else self.downstream.train
            self._on_device[part] = computing.to_device(images)
        return self._on_device[part]

    def _load_labelled(self) -> Any:
        c = self.section
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
