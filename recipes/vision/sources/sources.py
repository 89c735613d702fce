"""Where images come from: every source opened as pictures, labels and fixed parts."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..imagesets import check_labels
from ..pictures.base import Images
from ..pictures.files import FileImages
from ..pictures.memory import ArrayImages
from .folders import FolderListing, list_folder, list_images, passed_over_words
from .splits import Rounding

Purpose = Literal["pretext", "downstream"]

DIGITS = "datasets/data/digits.csv.gz"
"""Where scikit-learn keeps its digits: 64 pixels and the class in a row."""


@dataclass(frozen=True)
class Source:
    """An opened source of N images; raises DataError on labels that an `ImageSet` would refuse.

    `labels`: int64 [N], bool [N, len(classes)] or float32 [N, len(classes)] as in an `ImageSet`, or None for unlabelled
    images. `parts`: positions (int64) of the parts that the source itself fixes: "train" and, where it has them, "val"
    and "test"; "unlabelled" alone for unlabelled images. `images`: the pictures, each at its own size. `val_rounding`:
    how many of each class a validation set takes, see `splits.hold_out`. `passed_over`: what was not taken and why, in
    words, for messages that there are too few images; "" for nothing.
    """

    name: str
    classes: tuple[str, ...]
    labels: Tensor | None
    parts: dict[str, Tensor]
    images: Images
    val_rounding: Rounding = "largest remainders"
    passed_over: str = ""

    def __post_init__(self) -> None:
        if self.labels is not None:
            check_labels(self.labels, len(self.classes), self.name)


@dataclass(frozen=True)
class Request:
    """What to open a source for: see `load_downstream` for the fields."""

    root: Path
    download: bool
    purpose: Purpose
    split_seed: int = 0


def open_digits(request: Request) -> Source:
    """The 1797 handwritten digits of 8 x 8 px that scikit-learn bundles, 0..16 scaled to 0..255; one part, no download.

    Raises DataError if scikit-learn is not installed.
    """
    pixels, digits = _digits()
    grey = torch.from_numpy(np.rint(pixels * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    labels = torch.from_numpy(digits.astype(np.int64))
    parts = {"train": torch.arange(len(labels))}
    return Source("digits", tuple("0123456789"), labels, parts, ArrayImages(grey))


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's ``load_digits(return_X_y=True)`` from its file: importing it takes most of the time of torch's."""
    found = find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        raise DataError("the digits come with scikit-learn: install it by pip install 'bilevel[demo]'")
    file = Path(found.submodule_search_locations[0]) / DIGITS
    if not file.is_file():
        # A version that keeps them elsewhere.
        from sklearn.datasets import load_digits

        bunch: Any = load_digits()
        return bunch.data, bunch.target
    rows = np.loadtxt(file, delimiter=",")
    return rows[:, :-1], rows[:, -1].astype(np.int64)


def _folder_source(path: str, listing: FolderListing) -> Source:
    return Source(
        f"folder:{path}",
        listing.classes,
        listing.labels,
        listing.parts,
        FileImages(listing.files),
        passed_over=passed_over_words(listing.passed_over),
    )


def open_folder(path: str) -> Source:
    """Labelled images in class folders below `path`; see `list_folder`."""
    return _folder_source(path, list_folder(Path(path)))


def open_images(path: str) -> Source:
    """Unlabelled images at any depth below `path`; see `list_images`."""
    return _folder_source(path, list_images(Path(path)))
