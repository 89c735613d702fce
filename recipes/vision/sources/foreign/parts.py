"""Train, val, test and unlabelled parts by the names that others give them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TypeVar

import torch
from torch import Tensor

from ...errors import DataError
from ..folders import PART_NAMES
from ..sources import Purpose

T = TypeVar("T")

LABELLED = tuple(PART_NAMES)
PARTS = (*LABELLED, "unlabelled")
UNLABELLED_NAMES = ("unlabelled", "unlabeled", "unsupervised")
NAMES = {name: part for part, names in PART_NAMES.items() for name in names} | dict.fromkeys(
    UNLABELLED_NAMES, "unlabelled"
)
KNOWN = ", ".join(NAMES)


def renamed(groups: Mapping[str, T], name: str) -> dict[str, T]:
    """The same by our names for parts. Raises DataError on a split of another name and on two of one part."""
    found: dict[str, T] = {}
    for split, group in groups.items():
        part = NAMES.get(split.lower())
        if part is None:
            raise DataError(
                f"{name}: the split {split!r} is none that is known ({KNOWN}); say which to take, for example by "
                f"?train={split}"
            )
        if part in found:
            raise DataError(
                f"{name}: the split {split!r} is one more {part} part; say which to take by ?{part}={split}"
            )
        found[part] = group
    return found


def part_of_file(path: str, name: str) -> str | None:
    """The part that a file below a data set's folder belongs to, by the words of its path; None where none says.

    Raises DataError where it says two.
    """
    words = re.split(r"[^A-Za-z]+", str(PurePath(path).with_suffix("")).lower())
    parts = sorted({NAMES[word] for word in words if word in NAMES})
    if len(parts) > 1:
        raise DataError(f"{name}: {path} names two parts, {' and '.join(parts)}: rename it")
    return parts[0] if parts else None


def files_by_part(paths: Sequence[str], name: str) -> dict[str, list[int]]:
    """Positions of files by part; all of them are "train" where no name says otherwise.

    Raises DataError where some say their part and others do not.
    """
    groups: dict[str | None, list[int]] = {}
    for position, path in enumerate(paths):
        groups.setdefault(part_of_file(path, name), []).append(position)
    without = groups.pop(None, [])
    if not groups:
        return {"train": without}
    if without:
        raise DataError(
            f"{name}: {paths[without[0]]} does not say its part, but other files do ({KNOWN}): rename it, or move it"
        )
    return {str(part): positions for part, positions in groups.items()}


def wanted_parts(groups: Mapping[str, T], purpose: Purpose, name: str) -> dict[str, T]:
    """The parts to open, in the order of `PARTS`: for a pretext task the unlabelled one alone where there is one.

    One part alone is the whole set, and is called train unless it is unlabelled. Raises DataError where there are val
    or test parts but none to train on.
    """
    if "unlabelled" in groups and (purpose == "pretext" or len(groups) == 1):
        return {"unlabelled": groups["unlabelled"]}
    labelled = {part: groups[part] for part in LABELLED if part in groups}
    if len(labelled) == 1:
        return {"train": next(iter(labelled.values()))}
    if "train" not in labelled:
        raise DataError(f"{name} has the parts {' and '.join(labelled)}, but none to train on: name one train")
    return labelled


def consecutive(counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Positions of each part where the parts lie one behind the other."""
    parts, start = {}, 0
    for part, count in counts.items():
        parts[part] = torch.arange(start, start + count)
        start += count
    return parts
