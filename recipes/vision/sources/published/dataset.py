"""What a published data set is, and how it is opened: read, checked against its published counts, fetched if asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ....experiment.terminal import command_line
from ...errors import DataError
from ...imagesets import LabelKind
from ..sources import Request, Source
from .archives import Archive, fetch


@dataclass(frozen=True)
class Dataset:
    """One line of the table of published sets.

    `counts`: images in each part that the set itself fixes; `split`: images for train, val and test of a downstream
    task; `pretext`: images for the pretext task. `needs`: files and folders below the root, `archives`: where they
    come from, empty where `page` is all there is. `by_hand`: how to place them; `terms`: the licence, in short.
    `labels`: what they are.
    """

    name: str
    title: str
    reader: Callable[[Request], Source]
    classes: int
    counts: dict[str, int]
    split: tuple[int, int, int]
    pretext: int
    needs: tuple[str, ...]
    page: str
    terms: str
    archives: tuple[Archive, ...] = ()
    by_hand: str = ""
    labels: LabelKind = "single-label"

    @property
    def has_unlabelled(self) -> bool:
        """Whether its pretext images are a part of its own rather than all but the test images."""
        return self.pretext != sum(self.counts.values()) - self.counts["test"]

    @property
    def downloadable(self) -> bool:
        """Whether its official download works, as far as is known."""
        return bool(self.archives)

    def missing(self, root: Path) -> list[Path]:
        """The files and folders that are not there."""
        return [root / path for path in self.needs if not (root / path).exists()]


def remedy(dataset: Dataset, root: Path) -> str:
    """How to get the set and where to put it."""
    holds = f"so that {root} holds {', '.join(dataset.needs)}"
    elsewhere = "or set `data.root` to the folder that holds them"
    if not dataset.downloadable:
        return f"its official download is gone: {dataset.by_hand}, {holds}; {elsewhere}"
    files = " and ".join(f"{archive.url} and unpack it inside {root / archive.into}" for archive in dataset.archives)
    fetched = f"or set `data.download` to true, or run `{command_line()} data download {dataset.name}`"
    return f"download {files}, {holds}; {fetched}; {elsewhere}"


def check_counts(dataset: Dataset, source: Source) -> None:
    """Raise DataError if classes, parts or their images are not as many as published, or a class has none in a part."""
    if len(source.classes) != dataset.classes:
        raise DataError(f"{dataset.name} has {len(source.classes)} classes here, but {dataset.classes} are published")
    expected = {"unlabelled": dataset.pretext} if source.labels is None else dataset.counts
    for part, count in expected.items():
        positions = source.parts.get(part)
        found = 0 if positions is None else len(positions)
        if found != count:
            raise DataError(f"{dataset.name} has {found:,} images in its {part} part here, but {count:,} are published")
        if source.labels is None or positions is None:
            continue
        labels = source.labels[positions]
        images = labels.sum(0) if labels.dtype == torch.bool else torch.bincount(labels, minlength=dataset.classes)
        empty = (images == 0).nonzero().flatten().tolist()
        if empty:
            raise DataError(f"{dataset.name} has no image of class {source.classes[empty[0]]!r} in its {part} part")


def fetch_dataset(dataset: Dataset, root: Path) -> None:
    """Download and unpack the set below `root`. Raises DataError with instructions where that is not possible."""
    if not dataset.downloadable:
        raise DataError(f"{dataset.title} cannot be downloaded: {remedy(dataset, root)}")
    try:
        for archive in dataset.archives:
            fetch(archive, root)
    except DataError as error:
        raise DataError(f"the download of {dataset.title} failed: {error}; {remedy(dataset, root)}") from error


def open_dataset(dataset: Dataset, request: Request) -> Source:
    """The set below `request.root`, checked against `dataset`; images are decoded later, when they are read.

    If it cannot be read and `request.download` is true, it is fetched first. Raises DataError, naming the file at
    fault, with instructions.
    """
    try:
        source = dataset.reader(request)
        check_counts(dataset, source)
        return source
    except DataError as error:
        problem = f"{dataset.title} cannot be read: {error}"
        if not (request.download and dataset.downloadable):
            raise DataError(f"{problem}; {remedy(dataset, request.root)}") from error
    try:
        fetch_dataset(dataset, request.root)
    except DataError as error:
        raise DataError(f"{problem}; {error}") from error
    return open_dataset(dataset, replace(request, download=False))
