"""Labels of a whole source from whatever stands beside its images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import DataError
from ...pictures.base import Images
from ..sources import Source

Codes = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels as in an `ImageSet`, of all images of a source; a single-label image without one has -1.

    `declared`: the classes stand in the data set itself, rather than being those that occur.
    """

    values: Tensor
    classes: tuple[str, ...]
    declared: bool = True


def by_value(codes: Codes, values: Sequence[Any]) -> Labels:
    """Single labels whose classes are the values that occur, sorted; `codes` are positions in `values`, or -1.

    The number -1 is no class but no label, as in many data sets.
    """
    order = sorted((position for position, value in enumerate(values) if value != -1), key=values.__getitem__)
    place = np.full(len(values) + 1, -1, dtype=np.int64)
    place[order] = np.arange(len(order))
    return Labels(torch.from_numpy(place[codes]), tuple(str(values[position]) for position in order), declared=False)


def coded(values: Sequence[Any]) -> tuple[Codes, list[Any]]:
    """Each value, a number or a text, as its position among those that occur; None is -1."""
    positions: dict[Any, int] = {}
    codes = [-1 if value is None else positions.setdefault(value, len(positions)) for value in values]
    return np.asarray(codes, dtype=np.int64), list(positions)


def assembled(name: str, images: Images, parts: Mapping[str, Tensor], labels: Labels | None) -> Source:
    """The source of `images`, whose `parts` are those of `wanted_parts`.

    Without labels, or where no image has one, all its images but those of the test part are unlabelled.

    Raises:
        DataError: some images have a label and others none, or a class occurs in val or test but not in train.
    """
    missing = None if labels is None or labels.values.dtype != torch.int64 else labels.values < 0
    if labels is None or "unlabelled" in parts or (missing is not None and bool(missing.all())):
        kept = torch.cat([positions for part, positions in parts.items() if part != "test"])
        return Source(name, (), None, {"unlabelled": kept}, images=images)
    if missing is not None and bool(missing.any()):
        first = int(missing.nonzero()[0])
        part = next(part for part, positions in parts.items() if bool((positions == first).any()))
        raise DataError(
            f"{name}: image {first - int(parts[part][0])} of its {part} part has no label, but others do: name the "
            "parts to take by ?train=... and so on, or take those images out"
        )
    if not labels.declared:
        _check_classes(name, parts, labels)
    return Source(name, labels.classes, labels.values, dict(parts), images=images)


def _check_classes(name: str, parts: Mapping[str, Tensor], labels: Labels) -> None:
    """Raise DataError on a class that val or test has and train lacks."""
    known = torch.bincount(labels.values[parts["train"]], minlength=len(labels.classes)) > 0
    for part, positions in parts.items():
        strange = ~known[labels.values[positions]]
        if bool(strange.any()):
            label = int(labels.values[positions][strange][0])
            raise DataError(
                f"{name}: its {part} part has the class {labels.classes[label]!r}, which train does not have"
            )
