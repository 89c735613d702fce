"""STL-10: 100,000 unlabelled photographs for the pretext task, and 13,000 of ten classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ...errors import DataError
from ...pictures.memory import ArrayImages
from ..sources import Request, Source

STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
STL10_FOLDER = "stl10_binary"
STL10_COUNTS = {"train": 5000, "test": 8000, "unlabeled": 100000}
SIDE = 96
CHUNK = 1024


def _check_files(folder: Path, splits: tuple[str, ...]) -> None:
    """Raise DataError, naming the file, if one of `splits` is missing or cut short."""
    for split in splits:
        sizes = {f"{split}_X.bin": 3 * SIDE**2 * STL10_COUNTS[split]}
        if split != "unlabeled":
            sizes[f"{split}_y.bin"] = STL10_COUNTS[split]
        for name, size in sizes.items():
            file = folder / name
            if not file.is_file():
                raise DataError(f"the file {file} is missing")
            if file.stat().st_size != size:
                raise DataError(f"the file {file} is incomplete: {file.stat().st_size:,} bytes instead of {size:,}")


def _read(files: list[Path]) -> ArrayImages:
    """The images of the *_X.bin `files`, one after the other.

    The format: for each image its red, green and blue plane, each 96 x 96 bytes column by column.
    """
    stored = [np.memmap(file, dtype=np.uint8, mode="r").reshape(-1, 3, SIDE, SIDE) for file in files]
    images = torch.empty(sum(map(len, stored)), 3, SIDE, SIDE, dtype=torch.uint8)
    first = 0
    for part in stored:
        for start in range(0, len(part), CHUNK):
            # A copy: torch takes no memory that may not be written to.
            chunk = torch.from_numpy(part[start : start + CHUNK].transpose(0, 1, 3, 2).copy())
            images[first + start : first + start + len(chunk)] = chunk
        first += len(part)
    return ArrayImages(images)


def open_stl10(request: Request) -> Source:
    """STL-10 below `request.root`: train and test for a downstream task, the 100,000 unlabelled images as pretext data.

    Raises DataError, naming the file, if one that the purpose needs is missing or incomplete.
    """
    splits = ("unlabeled",) if request.purpose == "pretext" else ("train", "test")
    folder = request.root / STL10_FOLDER
    _check_files(folder, splits)
    images = _read([folder / f"{split}_X.bin" for split in splits])
    if request.purpose == "pretext":
        return Source("stl10", STL10_CLASSES, None, {"unlabelled": torch.arange(STL10_COUNTS["unlabeled"])}, images)
    stored = np.concatenate([np.fromfile(folder / f"{split}_y.bin", dtype=np.uint8) for split in splits])
    labels = torch.from_numpy(stored.astype(np.int64)) - 1
    count = STL10_COUNTS["train"]
    parts = {"train": torch.arange(count), "test": torch.arange(count, len(labels))}
    return Source("stl10", STL10_CLASSES, labels, parts, images)
