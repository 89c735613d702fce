"""Where images come from: every source opened as labels, fixed parts, and a way to read chosen images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ..imagesets import DataError, check_labels
from ..pictures.base import Images
from .folders import FolderListing, decode_all, list_folder, list_images, passed_over_words
from .splits import Rounding

Purpose = Literal["pretext", "downstream"]

CHUNK = 1024


@dataclass(frozen=True)
class Source:
    """An opened source of N images; raises DataError on labels that an `ImageSet` would refuse.

    `labels`: int64 [N], bool [N, len(classes)] or float32 [N, len(classes)] as in an `ImageSet`, or None for unlabelled
    images. `parts`: positions (int64) of the parts that the source itself fixes: "train" and, where it has them, "val"
    and "test"; "unlabelled" alone for unlabelled images.
    `read(positions)` gives uint8 [len(positions), C, image_size, image_size]. `val_rounding`: how many of each class a
    validation set takes, see `splits.hold_out`. `passed_over`: what was not taken and why, in words, for messages that
    there are too few images; "" for nothing.
    """

    name: str
    classes: tuple[str, ...]
    labels: Tensor | None
    parts: dict[str, Tensor]
    read: Callable[[Tensor], Tensor] = torch.clone  # the one way or the other, until all sources give images
    images: Images | None = None
    val_rounding: Rounding = "largest remainders"
    passed_over: str = ""

    def __post_init__(self) -> None:
        if self.labels is not None:
            check_labels(self.labels, len(self.classes), self.name)


@dataclass(frozen=True)
class Request:
    """What to open a source for: see `load_downstream` for the fields."""

    image_size: int
    root: Path
    download: bool
    purpose: Purpose
    split_seed: int = 0


def resized(images: Tensor, side: int) -> Tensor:
    """Square uint8 images [n, C, H, H] at `side` px; bicubic, antialiased."""
    if images.shape[-1] == side:
        return images
    # In float, because the 8-bit kernels of different processors round differently.
    resized = F.resize(images.float(), [side, side], InterpolationMode.BICUBIC, antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def open_digits(request: Request) -> Source:
    """The 1797 handwritten digits of 8 x 8 px that scikit-learn bundles, 0..16 scaled to 0..255; one part, no download.

    Raises DataError if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # an optional dependency, which the other sources do without
    except ImportError as error:
        raise DataError("the digits come with scikit-learn: install it by pip install 'bilevel[demo]'") from error
    pixels, digits = load_digits(return_X_y=True)
    grey = torch.from_numpy(np.rint(pixels * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    labels = torch.from_numpy(digits.astype(np.int64))
    parts = {"train": torch.arange(len(labels))}
    return Source(
        "digits", tuple("0123456789"), labels, parts, lambda positions: resized(grey[positions], request.image_size)
    )


def _folder_source(path: str, listing: FolderListing, request: Request) -> Source:
    """Decoded as RGB when they are read."""

    def read(positions: Tensor) -> Tensor:
        chosen = listing.files.select(positions)
        return decode_all([Path(chosen.path(position)) for position in range(len(chosen))], request.image_size)

    passed_over = passed_over_words(listing.passed_over)
    return Source(f"folder:{path}", listing.classes, listing.labels, listing.parts, read, passed_over=passed_over)


def open_folder(path: str, request: Request) -> Source:
    """Labelled images in class folders below `path`; see `list_folder`."""
    return _folder_source(path, list_folder(Path(path)), request)


def open_images(path: str, request: Request) -> Source:
    """Unlabelled images at any depth below `path`; see `list_images`."""
    return _folder_source(path, list_images(Path(path)), request)
