"""Images held in memory, and the three labelled sets that a downstream task needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class DataError(ValueError):
    """A data set that is missing, damaged or too small for what was asked; the message says what to do."""


def check_labels(labels: Tensor, count: int, name: str) -> None:
    """Raise DataError, naming the first image at fault, unless every label lies in 0 .. count - 1."""
    wrong = ((labels < 0) | (labels >= count)).nonzero()
    if len(wrong):
        position = int(wrong[0])
        raise DataError(
            f"{name}: image {position} has label {int(labels[position])}, "
            f"but the labels of {count} classes run from 0 to {count - 1}"
        )


@dataclass(frozen=True, eq=False)
class ImageSet:
    """`images`: uint8 [N, C, H, W] with C 1 or 3; `labels`: int64 [N] of positions in `classes`, or None.

    Raises DataError on another type or shape, or on a label that is not in 0 .. len(classes) - 1.
    """

    images: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise DataError(
                f"{self.name}: images must be uint8 of shape [N, 1 or 3, H, W], "
                f"got {images.dtype} of shape {tuple(images.shape)}"
            )
        if labels is None:
            return
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise DataError(
                f"{self.name}: labels must be int64 of shape [{len(images)}], one an image, "
                f"got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        check_labels(labels, len(self.classes), self.name)

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> ImageSet:
        """The same set with images and labels on `device`."""
        labels = None if self.labels is None else self.labels.to(device)
        return ImageSet(self.images.to(device), labels, self.classes, self.name)

    def subset(self, indices: Sequence[int] | Tensor) -> ImageSet:
        """The images at `indices`, in that order; a copy. Raises IndexError on a position that is not there."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        labels = None if self.labels is None else self.labels[chosen]
        return ImageSet(self.images[chosen], labels, self.classes, self.name)


@dataclass(frozen=True, eq=False)
class DownstreamSets:
    """Labelled `train`, `val` and `test` sets over the same classes.

    `indices` maps "train", "val" and "test" to the positions of their images in the source, so that a run can store
    its split. Raises DataError if a set has no labels or no images, or if the classes differ.
    """

    train: ImageSet
    val: ImageSet
    test: ImageSet
    indices: dict[str, list[int]]

    def __post_init__(self) -> None:
        for part, images in (("train", self.train), ("val", self.val), ("test", self.test)):
            if images.labels is None or len(images) == 0:
                raise DataError(f"{images.name}: the {part} set needs images and labels")
            if images.classes != self.train.classes:
                raise DataError(f"{images.name}: the classes of the {part} set differ from those of the train set")
            if len(self.indices.get(part, ())) != len(images):
                raise DataError(f"{images.name}: indices[{part!r}] must hold one position for each image of that set")
