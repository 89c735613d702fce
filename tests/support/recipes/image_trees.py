"""Small image trees and shorthands for the tests of the recipe's data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from recipes.vision.sources.loading import DownstreamSets, ImageSet, load_downstream, load_labelled, load_pretext


def picture(seed: int, width: int = 20, height: int = 20) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def tree(root: Path, sizes: dict[str, int], suffix: str = ".png", seed: int = 0) -> Path:
    """Class folders below `root` with that many images each, all different, also from those of another seed."""
    for position, (name, count) in enumerate(sizes.items(), 100 * seed):
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture(1000 * position + i).save(root / name / f"{i:03d}{suffix}")
    return root


def downstream(source: str, root: Path = Path("."), **options: Any) -> DownstreamSets:
    return load_downstream(source, root=root, download=False, **options)


def labelled(source: str, root: Path = Path("."), **options: Any) -> ImageSet:
    return load_labelled(source, root=root, download=False, **options)


def pretext(source: str, root: Path = Path("."), **options: Any) -> ImageSet:
    return load_pretext(source, root=root, download=False, **options)


def rows(images: ImageSet) -> set[bytes]:
    return {images.images.at(position).numpy().tobytes() for position in range(len(images))}


def counts(images: ImageSet) -> list[int]:
    assert images.labels is not None
    return torch.bincount(images.labels, minlength=len(images.classes)).tolist()


def same_labels(images: ImageSet, expected: Any) -> bool:
    assert images.labels is not None
    return np.array_equal(images.labels.numpy(), expected)
