"""Pictures that are the same, byte by byte, under whatever names and in whatever sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..imagesets import DownstreamSets, ImageSet
from ..pictures.base import EncodedImages, EncodedItem, Images
from ..pipeline.work import digest
from .contents import Contents, by_threads, pixel_digests

Mask = np.ndarray[Any, np.dtype[np.bool_]]


def copies(images: Images, others: Images) -> Mask:
    """bool [N], which of `images` are copies of one of `others`: of the same bytes as files, or the same pixels.

    Files are compared with files, by size, then by their first and last 4 KB, then by a hash of the whole; pictures in
    memory that come from no file, pixel by pixel, with such. Nothing of a million files but their sizes is looked at,
    save of those whose size one of `others` has.

    Raises:
        DataError: a file cannot be read.
    """
    one, other = images.origin, others.origin
    if isinstance(one, EncodedImages) and isinstance(other, EncodedImages):
        return _file_copies(one, other)
    if not comparable(images, others) or _other_shapes(images, others):
        return np.zeros(len(images), dtype=bool)
    known = set(pixel_digests(others, range(len(others))))
    return np.asarray([found in known for found in pixel_digests(images, range(len(images)))], dtype=bool)


def comparable(images: Images, others: Images) -> bool:
    """Whether `copies` looks at anything: both are image files, or both lie in memory and come from no files."""
    files = [isinstance(pictures.origin, EncodedImages) for pictures in (images, others)]
    return all(files) if any(files) else images.in_memory and others.in_memory


def _other_shapes(images: Images, others: Images) -> bool:
    one, other = images.array, others.array
    return one is not None and other is not None and one.shape[1:] != other.shape[1:]


def _file_copies(one: EncodedImages, other: EncodedImages) -> Mask:
    # A size that nobody has looked at, -1, may be any.
    sizes, wanted = one.file_sizes, other.file_sizes
    here = np.isin(sizes, wanted) | (sizes < 0) if (wanted >= 0).all() else np.ones(len(sizes), dtype=bool)
    there = np.isin(wanted, sizes) | (wanted < 0) if (sizes >= 0).all() else np.ones(len(wanted), dtype=bool)
    for kind in ("ends", "whole"):
        mine, theirs = np.flatnonzero(here), np.flatnonzero(there)
        found, known = _digests(one, mine.tolist(), kind), _digests(other, theirs.tolist(), kind)
        both = set(found) & set(known)
        here[mine] = [value in both for value in found]
        there[theirs] = [value in both for value in known]
    return here


def _digests(images: EncodedImages, positions: list[int], kind: str) -> list[bytes]:
    def looked_at(chunk: Sequence[int]) -> list[bytes]:
        return [digest(_part(item, kind)) for item in images.items(chunk)]

    return [value for _, found in by_threads(looked_at, positions) for value in found]


def _part(item: EncodedItem, kind: str) -> bytes:
    return item.ends() if kind == "ends" else item.content()


def without_copies(images: ImageSet, sets: DownstreamSets) -> tuple[ImageSet, dict[str, int]]:
    """The pretext images without copies of test images, and how many there were of images of "test" and of "val".

    Copies of validation images stay. Images that come from no file are compared with such alone.

    Raises:
        DataError: no image is left, or a file cannot be read.
    """
    of_test, of_val = copies(images.images, sets.test.images), copies(images.images, sets.val.images)
    found = {"test": int(of_test.sum()), "val": int((of_val & ~of_test).sum())}
    if not found["test"]:
        return images, found
    if of_test.all():
        raise DataError(
            f"{images.name}: every one of the {len(images):,} pretext images is a copy of a test image, and these are "
            "left out; give other images to data.pretext"
        )
    return images.subset(torch.from_numpy(np.flatnonzero(~of_test))), found


def labels_of_copies(contents: Contents, others: Contents, labels: Tensor) -> Tensor:
    """int64 [N], of each picture the label of the one of `others` that it is a copy of, by `labels`; else -1.

    Of both, all contents must be known.
    """
    known = dict(zip((row.tobytes() for row in others.digests), labels.tolist(), strict=True))
    return torch.tensor([known.get(row.tobytes(), -1) for row in contents.digests], dtype=torch.int64)


def contradictions(images: ImageSet, trusted: Tensor, name: Callable[[int], str]) -> list[str]:
    """Each labelled picture, by `name`, whose label is not that of its copy, which `labels_of_copies` has found."""
    classes, given = images.classes, images.labels
    assert given is not None, "read with labels"
    rows = ((trusted >= 0) & (trusted != given)).nonzero()[:, 0].tolist()
    return [f"{name(row)} (given {classes[int(given[row])]}, trusted {classes[int(trusted[row])]})" for row in rows]


def but_copies(contents: Contents, rows: Tensor, others: Tensor) -> Tensor:
    """`rows` of a set but for copies of its rows `others`; all contents must be known."""
    held = {contents.digests[row].tobytes() for row in others.tolist()}
    return rows[torch.tensor([contents.digests[row].tobytes() not in held for row in rows.tolist()], dtype=torch.bool)]


def copies_between(contents: dict[str, Contents]) -> dict[str, int]:
    """How many pictures of the second set of each pair of labelled sets are copies of one of the first: "train and
    val": 3.

    Pairs without any are left out.
    """
    rows = {part: [row.tobytes() for row in known.digests] for part, known in contents.items()}
    found = {}
    for one, other in combinations(rows, 2):
        known = set(rows[one])
        count = sum(row in known for row in rows[other])
        if count:
            found[f"{one} and {other}"] = count
    return found
