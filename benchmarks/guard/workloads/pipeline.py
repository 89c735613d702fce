"""The recipes' input pipeline in one process: two random views each of 64 JPEGs of 320 x 240 px."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from recipes.vision.pictures.memory import read_all
from recipes.vision.pipeline.loader import Loader
from recipes.vision.pipeline.workers import Workers
from recipes.vision.sources.loading import load_pretext
from recipes.vision.views.view_policy import ViewPolicy

PICTURES, WIDTH, HEIGHT = 64, 320, 240
VIEWS = (ViewPolicy(size=96, blur_probability=1.0), ViewPolicy(size=96, blur_probability=0.1, solarize_probability=0.2))


def write_pictures(folder: Path) -> Path:
    """Smooth colours with some grain, drawn by a seed."""
    draw = np.random.default_rng(0)
    for number in range(PICTURES):
        coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.float64)
        grained = smooth + draw.normal(0.0, 8.0, smooth.shape)
        place = folder / "pictures" / f"{number:03}.jpg"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(grained.clip(0, 255).astype(np.uint8)).save(place, quality=90)
    return folder / "pictures"


def views(*, in_memory: bool) -> Callable[[Path], Callable[[], object]]:
    def make(folder: Path) -> Callable[[], object]:
        source = f"folder:{write_pictures(folder)}"
        images = load_pretext(source, root="", download=False, evaluated=False, storage="stream").images
        loader = Loader(read_all(images) if in_memory else images, VIEWS, Workers(0))
        rows = torch.arange(PICTURES)
        return lambda: loader.make(rows, 1)

    return make


ROWS: dict[str, Callable[[Path], Callable[[], object]]] = {
    "from files": views(in_memory=False),
    "in memory": views(in_memory=True),
}
