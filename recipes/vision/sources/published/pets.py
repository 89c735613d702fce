"""Oxford-IIIT Pets: trainval and test of its published lists."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..sources import Request, Source
from .reading import fields, file_source, reading


def open_pets(request: Request) -> Source:
    """Oxford-IIIT Pets: train (the published trainval) and test.

    Each line of a list: the image's name without its suffix, its class from 1, species, breed within the species.
    torchvision's own reader is not used, because it decodes an image to tell its label.
    """
    folder = request.root / "oxford-iiit-pet"
    lists = {"train": folder / "annotations" / "trainval.txt", "test": folder / "annotations" / "test.txt"}
    names: dict[int, str] = {}
    parts: dict[str, tuple[list[Path], Tensor]] = {}
    for part, file in lists.items():
        rows = fields(file, 4)
        with reading(file):
            labels = [int(label) - 1 for _, label, _, _ in rows]
        if part == "train":
            names = {label: image.rsplit("_", 1)[0] for label, (image, *_) in zip(labels, rows, strict=True)}
        images = [folder / "images" / f"{image}.jpg" for image, *_ in rows]
        parts[part] = images, torch.tensor(labels, dtype=torch.int64)
    classes = [names[label].replace("_", " ").title() for label in sorted(names)]
    return file_source("pets", classes, parts, request, lists=lists)
