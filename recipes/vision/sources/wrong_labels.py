"""Right labels from a table, and wrong ones that are planted, for experiments in which the truth is known."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from bilevel.training import derive_seed

from ..errors import DataError
from ..imagesets import ImageSet
from ..pictures.files import FileImages
from .label_table import read_label_table

FLIPS = re.compile(r"(uniform|pair):(\d*\.?\d+(?:e-\d+)?)")


def check_flips(flips: str | None) -> str | None:
    """The same flips, see `planted`, or None. Raises ValueError on anything else."""
    found = FLIPS.fullmatch("uniform:0.5" if flips is None else flips)
    if found is None or not 0.0 < float(found[2]) < 1.0:
        raise ValueError(
            "must be uniform:SHARE (to any other class), pair:SHARE (to the next class) or null, with a share "
            f"between 0 and 1, got {flips!r}"
        )
    return flips


def planted(labels: Tensor, classes: int, flips: str, seed: int) -> Tensor:
    """The labels, int64 [N], with a share of them made wrong: the nearest whole number, chosen at random by `seed`.

    Args:
        flips: "uniform:SHARE", to each of the other classes with the same chance; or "pair:SHARE", from class c to
            c + 1, and from the last to the first.
    """
    kind, _, share = flips.partition(":")
    generator = torch.Generator().manual_seed(derive_seed(seed, "flips"))
    chosen = torch.randperm(len(labels), generator=generator)[: round(float(share) * len(labels))]
    by = torch.randint(1, classes, (len(chosen),), generator=generator) if kind == "uniform" else 1
    made = labels.clone()
    made[chosen] = (labels[chosen] + by) % classes
    return made


def labels_by_table(images: ImageSet, path: Path, field: str) -> Tensor:
    """int64 [N], the labels of pictures in files by a table `file,label` of their paths below the source's folder.

    Raises:
        DataError: naming `field`: pictures that are no files of one folder, another class, or a picture that the table
            lacks; or as `read_label_table`.
    """
    origin = images.images.origin
    if not isinstance(origin, FileImages):
        raise DataError(f"{field}: a table names files, and the pictures of {images.name} are none; leave it out")
    table = read_label_table(Path(origin.files.root), path)
    if len(table.columns) != 1:
        raise DataError(f"{field}: {path} has {len(table.columns) + 1} columns; keep two, file and label")
    places = {name: place for place, name in enumerate(images.classes)}
    for text in table.texts:
        if text not in places:
            raise table.refuse(text, f"{text!r} is no class of {images.name}; there are {', '.join(images.classes)}")
    known = {
        table.files.relative(row): places[table.texts[code]] for row, code in enumerate(table.codes[:, 0].tolist())
    }
    names = [origin.file_name(row) for row in range(len(images))]
    missing = [name for name in names if name not in known]
    if missing:
        raise DataError(f"{field}: {path} lacks {len(missing):,} of the pictures, such as {missing[0]}; add them")
    return torch.tensor([known[name] for name in names])
