"""Pictures of several sizes and kinds as files' bytes, and what Pillow makes of them."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from recipes.vision.pictures.base import Item
from recipes.vision.sources.sources import Purpose, Request
from tests.support.recipes.image_trees import picture

SIZES = [(20, 30), (31, 17), (8, 8), (64, 40), (1, 9)]
ON_ITS_SIDE = 6


def encoded(seed: int, kind: str = "PNG", exif_turn: int | None = None) -> bytes:
    """A picture as the bytes of a file; its size, width by height, goes by the seed."""
    image = picture(seed, *SIZES[seed % len(SIZES)])
    exif = Image.Exif()
    if exif_turn is not None:
        exif[0x0112] = exif_turn
    held = io.BytesIO()
    image.save(held, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    return held.getvalue()


def by_pillow(content: bytes) -> Tensor:
    """What Pillow decodes, as uint8 [3, H, W]; turned upright by hand."""
    with Image.open(io.BytesIO(content)) as image:
        pixels = np.array(image.convert("RGB"))
        if image.getexif().get(0x0112) == ON_ITS_SIDE:
            pixels = np.rot90(pixels, -1).copy()
    return torch.from_numpy(pixels).permute(2, 0, 1)


def picture_and_packages(item: Item) -> tuple[np.ndarray, set[str]]:
    """An item's pixels, and which packages of `hf:PATH` this process has then. No tensor: it would need a socket."""
    return item.picture().numpy(), {"datasets", "pandas", "pyarrow"} & set(sys.modules)


def request(purpose: Purpose = "downstream") -> Request:
    return Request(root=Path(), download=False, purpose=purpose)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of caches, one a test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"
