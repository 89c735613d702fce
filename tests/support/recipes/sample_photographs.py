"""Scikit-learn's two sample photographs as image files of about 500 x 375 px."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

TURNS = {3: 180, 6: 270, 8: 90}
"""Degrees anticlockwise that put a picture upright, by EXIF's number."""


@cache
def originals() -> tuple[Image.Image, ...]:
    """The photographs, 640 x 427 px."""
    return tuple(Image.fromarray(array) for array in load_sample_images().images)


def photograph(number: int, width: int = 500, height: int = 375, mode: str = "RGB") -> Image.Image:
    """A part of one of them at this size; another part for every number."""
    whole = originals()[number % 2]
    left, top = 13 * number % 120, 7 * number % 50
    return whole.crop((left, top, left + 500, top + 375)).resize((width, height)).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", turn: int | None = None, **options: Any) -> bytes:
    """An image file's bytes; with EXIF's `turn`, of a picture that has to be turned to look like this one."""
    exif = Image.Exif()
    if turn is not None:
        exif[0x0112] = turn
        image = image.rotate(-TURNS[turn], expand=True)
    held = io.BytesIO()
    image.save(held, kind, **{"exif": exif, **({"quality": 90} if kind == "JPEG" else {}), **options})
    return held.getvalue()


def by_pillow(content: bytes) -> Image.Image:
    """What Pillow makes of an image file, upright."""
    with Image.open(io.BytesIO(content)) as image:
        turn = image.getexif().get(0x0112)
        image = image.convert("RGB")
        return image.rotate(TURNS[turn], expand=True) if turn in TURNS else image


def pixels(image: Image.Image) -> Tensor:
    """uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def photograph_folder(root: Path, counts: dict[str, int], width: int = 500, height: int = 375) -> Path:
    """Class folders of JPEGs below `root`, all different."""
    number = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            content = encoded(photograph(number, width, height))
            (root / name / f"{i:03d}.jpg").write_bytes(content)
            number += 1
    return root
