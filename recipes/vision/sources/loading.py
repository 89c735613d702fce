"""The images of a run: unlabelled ones for the pretext task, and train, val and test sets for the downstream task."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from ...experiment.folder.paths import user_path
from ...experiment.plugins import PluginError, resolve
from ..errors import DataError
from ..imagesets import DownstreamSets, ImageSet, check_classes
from ..pictures.base import Images
from ..pictures.files import FileImages
from ..pictures.memory import read_all
from ..pictures.space import check_fits
from .foreign.hugging_face import open_hugging_face
from .foreign.map_style import gives_sets, open_map_style
from .foreign.web_dataset import open_web_dataset
from .label_file import LABEL_FILE, open_label_file
from .published.catalog import DATASETS
from .published.dataset import open_dataset
from .sources import Request, Source, open_digits, open_folder, open_images
from .splits import TEST_STREAM, TRAIN_CAP_STREAM, VAL_CAP_STREAM, VAL_STREAM, Cap, hold_out, limited, stream
from .subset_list import read_subset

__all__ = [
    "CustomSource",
    "DataError",
    "DownstreamSets",
    "ImageSet",
    "load_downstream",
    "load_labelled",
    "load_pretext",
]

DIGITS = "digits"
FOLDER_PREFIX = "folder:"
FOREIGN = {"hf": open_hugging_face, "webdataset": open_web_dataset}

Storage = Literal["auto", "memory", "stream"]
SMALL_SET = 2**25
"""Bytes of files that are read into memory without being asked to."""


@runtime_checkable
class CustomSource(Protocol):
    """What a class named as `module:Class` must offer; it is made without arguments."""

    def pretext(self) -> ImageSet:
        """Images for the pretext task; it is up to the class to leave the test images out."""
        ...

    def downstream(self) -> DownstreamSets:
        """The three labelled sets."""
        ...


def _custom(source: str) -> CustomSource:
    """An instance of the class named by `source`. Raises DataError if it leads to no such class."""
    try:
        found = resolve(source)
    except PluginError as error:
        raise DataError(f"the data source {error}") from error
    if not isinstance(found, type):
        raise DataError(f"the data source {source!r} must name a class, but it is a {type(found).__name__}")
    instance = found()
    if not isinstance(instance, CustomSource):
        raise DataError(f"the data source {source!r} must have the methods pretext() and downstream()")
    return instance


def _open(source: str, request: Request, labelled: bool = True) -> Source | CustomSource:
    """The source by its name; the images alone unless `labelled`, where it goes by that.

    Raises DataError, with all the forms there are, on an unknown one.
    """
    if source == DIGITS:
        return open_digits(request)
    if source in DATASETS:
        return open_dataset(DATASETS[source], request)
    if source.startswith(FOLDER_PREFIX) and source != FOLDER_PREFIX:
        path = str(user_path(source.removeprefix(FOLDER_PREFIX)))
        if os.path.isfile(Path(path) / LABEL_FILE):
            return open_label_file(path)
        return open_folder(path) if labelled else open_images(path)
    kind, _, path = source.partition(":")
    if kind in FOREIGN and path:
        return FOREIGN[kind](path, request, labelled)
    if ":" in source and kind not in FOREIGN and not source.startswith(FOLDER_PREFIX):
        return _custom(source) if gives_sets(source) else open_map_style(source, request, labelled)
    if source and os.path.isdir(user_path(source)):
        raise DataError(f"there is no data source {source!r}, but a folder of that name: write folder:{source}")
    raise DataError(
        f"there is no data source {source!r}; there are: {', '.join([DIGITS, *DATASETS])}, "
        "folder:PATH (class folders of images, or images with labels.csv), hf:PATH (Hugging Face datasets on a disk), "
        "webdataset:PATH (tar shards) and module:Class (your own)"
    )


def _without_test(source: Source, labels: Tensor, test_fraction: float, split_seed: int) -> tuple[Tensor, Tensor]:
    """Positions of the test set and of the train part without it; the same for either purpose."""
    if "test" in source.parts:
        return source.parts["test"], source.parts["train"]
    return hold_out(
        source.parts["train"],
        labels,
        source.classes,
        name=source.name,
        fraction=test_fraction,
        keep=1 if "val" in source.parts else 2,
        generator=stream(split_seed, TEST_STREAM),
        passed_over=source.passed_over,
    )


def _val_and_train(
    source: Source, labels: Tensor, train: Tensor, val_fraction: float, split_seed: int
) -> tuple[Tensor, Tensor]:
    """Positions of the validation set, the source's own or one that is held out of `train`, and of the rest."""
    if "val" in source.parts:
        return source.parts["val"], train
    return hold_out(
        train,
        labels,
        source.classes,
        name=source.name,
        fraction=val_fraction,
        keep=1,
        generator=stream(split_seed, VAL_STREAM),
        rounding=source.val_rounding,
        passed_over=source.passed_over,
    )


def _capped_sets(sets: DownstreamSets, train_cap: Cap, val_cap: Cap, split_seed: int) -> DownstreamSets:
    """The sets of a custom source with the caps applied."""

    def kept(images: ImageSet, cap: Cap) -> list[int]:
        assert images.labels is not None  # checked by DownstreamSets
        return cap.kept(torch.arange(len(images)), images.labels, images.classes, images.name, split_seed).tolist()

    train, val = kept(sets.train, train_cap), kept(sets.val, val_cap)
    indices = sets.indices | {
        "train": [sets.indices["train"][position] for position in train],
        "val": [sets.indices["val"][position] for position in val],
    }
    return DownstreamSets(sets.train.subset(train), sets.val.subset(val), sets.test, indices)


def _check_numbers(split_seed: int, fractions: dict[str, float], counts: dict[str, int | None]) -> None:
    """Raise DataError on a number outside its range."""
    if split_seed < 0:
        raise DataError(f"split_seed must be 0 or above, got {split_seed}")
    for name, fraction in fractions.items():
        if not 0 < fraction < 1:
            raise DataError(f"{name} must lie strictly between 0 and 1, got {fraction}")
    for name, count in counts.items():
        if count is not None and count < 1:
            raise DataError(f"{name} must be at least 1, got {count}")


def load_downstream(
    source: str,
    *,
    root: Path | str,
    download: bool,
    labels_per_class: int | None = None,
    val_per_class: int | None = None,
    val_fraction: float = 0.2,
    test_fraction: float = 0.25,
    split_seed: int = 0,
    train_list: Path | str | None = None,
    storage: Storage = "auto",
) -> DownstreamSets:
    """The labelled sets of `source`, split once and for all by `split_seed`; images are the originals.

    `source` is "digits", a published set of `datasets.catalog` such as "stl10" (below `root`, fetched if `download`),
    "folder:PATH" (class folders of images; or train/ and optionally val/ and test/ of them; or images with labels.csv,
    see `label_file`) or "module:Class" (a `CustomSource`).
    Where the source fixes no test set, the stratified `test_fraction` of all images is held out; where it fixes no
    validation set, the stratified `val_fraction` of the remaining ones (20% in the paper, appendix B.1). Of the
    training images those in the text file `train_list` are kept (`subset_list.read_subset`), where one is given. Then
    `labels_per_class` and `val_per_class` keep that many images of each class, smaller choices within larger ones;
    the test set stays whole. `storage`: see `stored`. Raises DataError, with the remedy, for whatever is wrong with a
    source or a number.
    """
    _check_numbers(
        split_seed,
        {"val_fraction": val_fraction, "test_fraction": test_fraction},
        {"labels_per_class": labels_per_class, "val_per_class": val_per_class},
    )
    train_cap = Cap(labels_per_class, "labels_per_class", TRAIN_CAP_STREAM)
    val_cap = Cap(val_per_class, "val_per_class", VAL_CAP_STREAM)
    opened = _open(source, Request(user_path(root), download, "downstream", split_seed))
    if not isinstance(opened, Source):
        sets = opened.downstream()
        if not isinstance(sets, DownstreamSets):
            raise DataError(f"{source}: downstream() must return DownstreamSets, got {type(sets).__name__}")
        return _capped_sets(sets, train_cap, val_cap, split_seed)
    labels = opened.labels
    if labels is None:
        raise DataError(f"{source}: a downstream task needs labels, but this source has none")
    test, train = _without_test(opened, labels, test_fraction, split_seed)
    val, train = _val_and_train(opened, labels, train, val_fraction, split_seed)
    if train_list is not None:
        train = _listed(opened, train, train_list)
    train = train_cap.kept(train, labels, opened.classes, opened.name, split_seed, opened.passed_over)
    val = val_cap.kept(val, labels, opened.classes, opened.name, split_seed, opened.passed_over)

    def images(positions: Tensor) -> ImageSet:
        chosen = stored(opened.images.subset(positions), storage, opened.name)
        return ImageSet(chosen, labels[positions], opened.classes, opened.name, opened.passed_over)

    indices = {"train": train.tolist(), "val": val.tolist(), "test": test.tolist()}
    return DownstreamSets(images(train), images(val), images(test), indices)


def _listed(source: Source, train: Tensor, train_list: Path | str) -> Tensor:
    """The training images that a list names. Raises DataError where it names none, or images are no files."""
    if not isinstance(source.images, FileImages):
        raise DataError(f"train_list names files, and the images of {source.name} are none; use labels_per_class")
    path = user_path(train_list)
    kept = train[torch.isin(train, read_subset(path, source.images.files))]
    if not len(kept):
        raise DataError(f"train_list: {path} names no training image of {source.name}, only held-out ones")
    return kept


def load_labelled(source: str, *, root: Path | str, download: bool, storage: Storage = "auto") -> ImageSet:
    """All labelled images of `source` as one set, in its order, of whatever parts they are.

    Sources, `storage` and errors are those of `load_downstream`, but for a `CustomSource`, which gives no single set.
    """
    opened = _open(source, Request(user_path(root), download, "downstream"))
    if not isinstance(opened, Source):
        raise DataError(f"{source}: gives three sets, where one is needed; name a Dataset of torch, or a folder")
    if opened.labels is None:
        raise DataError(f"{source}: labels are needed, but this source has none")
    positions = torch.cat([opened.parts[part] for part in ("train", "val", "test") if part in opened.parts])
    chosen = positions.sort().values
    labels = opened.labels[chosen]
    images = stored(opened.images.subset(chosen), storage, opened.name)
    made = ImageSet(images, labels, opened.classes, opened.name, opened.passed_over)
    if made.kind == "single-label":
        check_classes(made)
    return made


def load_pretext(
    source: str,
    *,
    root: Path | str,
    download: bool,
    limit: int | None = None,
    split_seed: int = 0,
    test_fraction: float = 0.25,
    evaluated: bool = True,
    storage: Storage = "auto",
) -> ImageSet:
    """The images of `source` for the pretext task, without labels and without any test image.

    The unlabelled part of the source where it has one, else all its images save the test set that `load_downstream`
    makes with the same `test_fraction` and `split_seed` (a class of one's own answers for that itself). Where the
    source is not `evaluated`, by the downstream task, no test set is held out, and images may lie in folders of any
    kind; only a test set that a published set fixes itself is left out always. `limit` keeps at most that many, chosen
    at random by `split_seed`, smaller choices within larger ones. Sources, `storage` and errors are those of
    `load_downstream`.
    """
    _check_numbers(split_seed, {"test_fraction": test_fraction}, {"limit": limit})
    opened = _open(source, Request(user_path(root), download, "pretext", split_seed), labelled=evaluated)
    if not isinstance(opened, Source):
        images = opened.pretext()
        if not isinstance(images, ImageSet):
            raise DataError(f"{source}: pretext() must return an ImageSet, got {type(images).__name__}")
        if limit is not None:
            images = images.subset(limited(len(images), limit, split_seed))
        return images.unlabelled()
    positions = _for_pretext(opened, evaluated, test_fraction, split_seed)
    if limit is not None:
        positions = positions[limited(len(positions), limit, split_seed)]
    images = stored(opened.images.subset(positions), storage, opened.name)
    return ImageSet(images, None, opened.classes, opened.name, opened.passed_over)


def _for_pretext(source: Source, evaluated: bool, test_fraction: float, split_seed: int) -> Tensor:
    """Positions of the images that the pretext task may see."""
    if "unlabelled" in source.parts:
        return source.parts["unlabelled"]
    assert source.labels is not None, "images without labels are a part of their own"
    train = source.parts["train"]
    if evaluated:
        _, train = _without_test(source, source.labels, test_fraction, split_seed)
    return torch.cat((train, source.parts["val"])) if "val" in source.parts else train


def stored(images: Images, storage: Storage, name: str) -> Images:
    """Pictures where `storage` says: read into "memory" now, or "stream"ed, read when they are needed.

    "auto" reads small sets, up to `SMALL_SET` of files, into memory. Batches are the same to the bit either way. `name`
    is the source's, for messages. Raises DataError where memory has no room for them.
    """
    small = images.nbytes is not None and images.nbytes <= SMALL_SET
    if storage == "stream" or (storage == "auto" and not small):
        return images
    if not images.in_memory:
        check_fits(images, name)
    return read_all(images)
