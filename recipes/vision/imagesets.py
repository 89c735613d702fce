"""Pictures with labels, and the three labelled sets that a downstream task needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from .errors import DataError
from .pictures.base import Images
from .pictures.memory import ArrayImages

LabelKind = Literal["single-label", "multi-label", "regression", "segmentation"]

KINDS: dict[torch.dtype, LabelKind] = {
    torch.int64: "single-label",
    torch.bool: "multi-label",
    torch.float32: "regression",
    torch.uint8: "segmentation",
}

IGNORED = 255
"""In the masks of a segmentation: a pixel that belongs to no class and counts nowhere."""


def check_labels(labels: Tensor, count: int, name: str) -> LabelKind:
    """The kind of `labels`, by their type: int64 [N], bool [N, count], float32 [N, count] or uint8 [N, H, W].

    Raises DataError on another type or shape, and, naming the first image at fault, on a class that is not in
    0 .. count - 1 (nor `IGNORED`, in a mask) or a target that is not finite.
    """
    if labels.dtype == torch.uint8 and labels.ndim == 3:
        wrong = ((labels >= count) & (labels != IGNORED)).nonzero()
        if len(wrong):
            position, row, column = wrong[0].tolist()
            raise DataError(
                f"{name}: the mask of image {position} has class {int(labels[position, row, column])} in row {row}, "
                f"column {column}, but {count} classes run from 0 to {count - 1}; {IGNORED} marks pixels of no class"
            )
        return "segmentation"
    if labels.dtype == torch.int64 and labels.ndim == 1:
        wrong = ((labels < 0) | (labels >= count)).nonzero()
        if len(wrong):
            position = int(wrong[0])
            raise DataError(
                f"{name}: image {position} has label {int(labels[position])}, "
                f"but the labels of {count} classes run from 0 to {count - 1}"
            )
        return "single-label"
    if labels.dtype not in (torch.bool, torch.float32) or labels.ndim != 2 or labels.shape[1] != count or count == 0:
        raise DataError(
            f"{name}: labels must be int64 of shape [N], one class an image, or bool of shape [N, {count}], any number "
            f"of classes an image, or float32 of shape [N, {count}], targets of a regression, or uint8 of shape "
            "[N, H, W], a class for each pixel; "
            f"got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if labels.dtype == torch.bool:
        return "multi-label"
    wrong = (~labels.isfinite()).nonzero()
    if len(wrong):
        position, target = wrong[0].tolist()
        raise DataError(f"{name}: target {target} of image {position} is {float(labels[position, target])}, not finite")
    return "regression"


@final
class ImageSet:
    """Pictures and their labels.

    `images` are pictures of any sizes, `Images`, or one tensor uint8 [N, C, H, W] with C 1 or 3, which becomes
    `ArrayImages`. `labels` are int64 [N], positions in `classes`; or bool [N, len(classes)], the classes in each
    image, maybe none; or float32 [N, len(classes)], targets of a regression, which `classes` names; or uint8 [N, H, W],
    a class for each pixel of the images, which lie in one tensor then, or `IGNORED`; or None. `kind` says which.
    `passed_over`: what of the source was not taken and why, in words; "" for nothing.

    Raises:
        DataError: another type or shape, a class out of range, a target that is not finite.
    """

    def __init__(
        self,
        images: Tensor | Images,
        labels: Tensor | None,
        classes: tuple[str, ...],
        name: str,
        passed_over: str = "",
    ) -> None:
        if isinstance(images, Tensor):
            if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
                raise DataError(
                    f"{name}: images must be uint8 of shape [N, 1 or 3, H, W], "
                    f"got {images.dtype} of shape {tuple(images.shape)}"
                )
            images = ArrayImages(images)
        self.images, self.labels, self.classes, self.name = images, labels, classes, name
        self.passed_over = passed_over
        if labels is not None:
            self._check(labels)

    def _check(self, labels: Tensor) -> None:
        check_labels(labels, len(self.classes), self.name)
        if len(labels) != len(self.images):
            raise DataError(
                f"{self.name}: labels must be int64, bool, float32 or uint8 with one row for each of the "
                f"{len(self.images)} images, got {len(labels)} rows"
            )
        if labels.ndim < 3:
            return
        array = self.images.array
        if array is None:
            raise DataError(f"{self.name}: masks need images in one tensor, all of one size")
        if labels.shape[1:] != array.shape[2:]:
            raise DataError(
                f"{self.name}: masks of {labels.shape[1]}x{labels.shape[2]} px do not fit images of "
                f"{array.shape[2]}x{array.shape[3]} px; every pixel of an image needs a class"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def kind(self) -> LabelKind | None:
        """What the labels are; None without labels."""
        return None if self.labels is None else KINDS[self.labels.dtype]

    def unlabelled(self) -> ImageSet:
        """The same pictures without labels."""
        return ImageSet(self.images, None, self.classes, self.name, self.passed_over)

    def by_classes_of(self, other: ImageSet) -> ImageSet:
        """The same single-label pictures, their labels by position in the classes of another set, of the same names.

        Raises:
            DataError: one of them has a class that the other lacks.
        """
        assert self.labels is not None, "single-label sets have labels"
        classes, alone = other.classes, sorted({*self.classes} ^ {*other.classes})
        if alone:
            named = [f"{name} ({(self if name in self.classes else other).name})" for name in alone[:5]]
            raise DataError(
                f"{self.name} and {other.name} must have the same classes, by name; one of them alone has "
                f"{', '.join(named)}{f' and {len(alone) - 5} more' * (len(alone) > 5)}: rename folders, or add pictures"
            )
        places = torch.tensor([classes.index(name) for name in self.classes])
        return ImageSet(self.images, places[self.labels], classes, self.name, self.passed_over)

    def subset(self, indices: Sequence[int] | Tensor) -> ImageSet:
        """The images at `indices`, in that order. Raises IndexError on a position that is not there."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        labels = None if self.labels is None else self.labels[chosen]
        return ImageSet(self.images.subset(chosen), labels, self.classes, self.name, self.passed_over)


def check_classes(train: ImageSet) -> None:
    """Raise DataError unless the training images are of two classes or more."""
    assert train.labels is not None  # checked by the caller
    first = train.classes[int(train.labels[0])]
    if len(train.classes) < 2:
        raise DataError(
            f"{train.name} has a single class, {first!r}, which leaves nothing to tell apart: add another one"
        )
    if bool((train.labels == train.labels[0]).all()):
        raise DataError(
            f"{train.name}: all {len(train):,} training images are of class {first!r}, one of {len(train.classes)}, "
            "which leaves nothing to tell apart: add images of another class to the training part"
        )


@dataclass(frozen=True, eq=False)
class DownstreamSets:
    """Labelled `train`, `val` and `test` sets of one kind over the same classes.

    `indices` maps "train", "val" and "test" to the positions of their images in the source, so that a run can store
    its split. Raises DataError if a set has no labels or no images, if the kinds of labels or the classes differ, and
    where single-label images leave nothing to tell apart: fewer than two classes, or training images of a single one.
    """

    train: ImageSet
    val: ImageSet
    test: ImageSet
    indices: dict[str, list[int]]

    def __post_init__(self) -> None:
        for part, images in (("train", self.train), ("val", self.val), ("test", self.test)):
            if images.labels is None or len(images) == 0:
                raise DataError(f"{images.name}: the {part} set needs images and labels")
            if images.kind != self.train.kind:
                raise DataError(
                    f"{images.name}: the {part} set has {images.kind} labels, but the train set {self.train.kind} ones"
                )
            if images.classes != self.train.classes:
                raise DataError(f"{images.name}: the classes of the {part} set differ from those of the train set")
            if len(self.indices.get(part, ())) != len(images):
                raise DataError(f"{images.name}: indices[{part!r}] must hold one position for each image of that set")
        if self.kind == "single-label":
            check_classes(self.train)

    @property
    def kind(self) -> LabelKind:
        """What the labels of all three sets are."""
        assert self.train.kind is not None  # checked above
        return self.train.kind
