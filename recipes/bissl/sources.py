"""Where images come from: every source opened as labels, fixed parts, and a way to read chosen images."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import STL10
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from recipes.bissl.folders import decode_all, list_folder
from recipes.bissl.imagesets import DataError, check_labels

Purpose = Literal["pretext", "downstream"]

STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
STL10_COUNTS = {"train": 5000, "test": 8000, "unlabeled": 100000}
STL10_SIDE = 96
CHUNK = 1024


@dataclass(frozen=True)
class Source:
    """An opened source of N images; raises DataError on a label that is not in 0 .. len(classes) - 1.

    `labels`: int64 [N], or None for unlabelled images. `parts`: positions (int64) of the parts that the source itself
    fixes: "train" and, where it has them, "val" and "test"; "unlabelled" alone for unlabelled images.
    `read(positions)` gives uint8 [len(positions), C, image_size, image_size].
    """

    name: str
    classes: tuple[str, ...]
    labels: Tensor | None
    parts: dict[str, Tensor]
    read: Callable[[Tensor], Tensor]

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


def _resized(images: Tensor, side: int) -> Tensor:
    """Square uint8 images at `side` px; bicubic, antialiased."""
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
        "digits", tuple("0123456789"), labels, parts, lambda positions: _resized(grey[positions], request.image_size)
    )


def open_folder(path: str, request: Request) -> Source:
    """Images in class folders below `path` (see `list_folder`), decoded as RGB when they are read."""
    listing = list_folder(Path(path).expanduser())
    parts = {part: torch.tensor(positions) for part, positions in listing.parts.items()}

    def read(positions: Tensor) -> Tensor:
        return decode_all([listing.files[position] for position in positions.tolist()], request.image_size)

    return Source(f"folder:{path}", listing.classes, torch.tensor(listing.labels), parts, read)


def _stl10_problem(folder: Path, splits: tuple[str, ...]) -> str | None:
    """What is wrong with the unpacked STL-10 files of `splits`, or None."""
    for split in splits:
        sizes = {f"{split}_X.bin": 3 * STL10_SIDE**2 * STL10_COUNTS[split]}
        if split != "unlabeled":
            sizes[f"{split}_y.bin"] = STL10_COUNTS[split]
        for name, size in sizes.items():
            file = folder / name
            if not file.is_file():
                return f"the file {file} is missing"
            if file.stat().st_size != size:
                return f"the file {file} is incomplete: {file.stat().st_size:,} bytes instead of {size:,}"
    return None


def _download_stl10(root: Path) -> None:
    """Download, verify and unpack STL-10 by torchvision."""
    try:
        STL10(str(root), split="test", download=True)
    except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
        raise DataError(f"the download of STL-10 failed ({error}); {_stl10_remedy(root)}") from error


def _stl10_remedy(root: Path) -> str:
    """Where the files come from and where they go."""
    return (
        f"download {STL10.url} (2.6 GB) and unpack it inside {root}, so that {root / STL10.base_folder} holds "
        f"train_X.bin, train_y.bin, test_X.bin, test_y.bin and unlabeled_X.bin; or set `data.download` to true; "
        f"or set `data.root` to the folder that holds {STL10.base_folder}"
    )


def _read_stl10(files: list[Path], positions: Tensor, side: int) -> Tensor:
    """The images at `positions` of the *_X.bin `files`, counted through, as uint8 [n, 3, side, side].

    The format: for each image its red, green and blue plane, each 96 x 96 bytes column by column.
    """
    images = torch.empty(len(positions), 3, side, side, dtype=torch.uint8)
    first = 0
    for file in files:
        stored = np.memmap(file, dtype=np.uint8, mode="r").reshape(-1, 3, STL10_SIDE, STL10_SIDE)
        here = ((positions >= first) & (positions < first + len(stored))).nonzero().squeeze(1)
        for chunk in here.split(CHUNK):
            chosen = stored[(positions[chunk] - first).numpy()].transpose(0, 1, 3, 2)
            images[chunk] = _resized(torch.from_numpy(chosen), side)
        first += len(stored)
    return images


def open_stl10(request: Request) -> Source:
    """STL-10 below `request.root`: train and test for a downstream task, the 100,000 unlabelled images as pretext data.

    Raises DataError with instructions if files are missing or incomplete and cannot be downloaded.
    """
    splits = ("unlabeled",) if request.purpose == "pretext" else ("train", "test")
    folder = request.root / STL10.base_folder
    if request.download and _stl10_problem(folder, splits) is not None:
        _download_stl10(request.root)
    problem = _stl10_problem(folder, splits)
    if problem is not None:
        raise DataError(f"STL-10 cannot be read: {problem}; {_stl10_remedy(request.root)}")

    def read(positions: Tensor) -> Tensor:
        return _read_stl10([folder / f"{split}_X.bin" for split in splits], positions, request.image_size)

    if request.purpose == "pretext":
        return Source("stl10", STL10_CLASSES, None, {"unlabelled": torch.arange(STL10_COUNTS["unlabeled"])}, read)
    stored = np.concatenate([np.fromfile(folder / f"{split}_y.bin", dtype=np.uint8) for split in splits])
    labels = torch.from_numpy(stored.astype(np.int64)) - 1
    count = STL10_COUNTS["train"]
    parts = {"train": torch.arange(count), "test": torch.arange(count, len(labels))}
    return Source("stl10", STL10_CLASSES, labels, parts, read)
