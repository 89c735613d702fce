"""JPEGs of the size of photographs, made from the two that scikit-learn brings."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

SIDES = 500, 375


def write_photographs(folder: Path, count: int, *, quality: int = 90, scale: float = 1.0) -> Path:
    """`count` JPEGs below the class folders "temple" and "flower" of `folder`, of 500 x 375 px or upright, in turns.

    Each is another part of its photograph, resized. `scale` multiplies the sides.
    """
    generator = np.random.default_rng(0)
    photographs = [Image.fromarray(array) for array in load_sample_images().images]
    for name in ("temple", "flower"):
        (folder / name).mkdir(parents=True)
    for index in range(count):
        label = index % 2
        sides = SIDES if index % 4 < 2 else SIDES[::-1]
        width, height = (round(scale * side) for side in sides)
        whole = photographs[label]
        part = 0.8 + 0.2 * generator.random()
        fit = part * min(whole.width / width, whole.height / height)
        across, down = fit * width, fit * height
        left, top = generator.random() * (whole.width - across), generator.random() * (whole.height - down)
        picture = whole.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + across, top + down))
        picture.save(folder / ("temple", "flower")[label] / f"{index:05d}.jpg", quality=quality)
    return folder
