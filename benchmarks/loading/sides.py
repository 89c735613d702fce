"""Two ways to the same views: lightly's transform in a DataLoader, and the pipeline of the recipes."""

import importlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from recipes.vision.pictures.base import Images
from recipes.vision.pipeline.loader import Loader
from recipes.vision.pipeline.workers import Workers
from recipes.vision.views.view_policy import ViewPolicy

VIEWS = (
    ViewPolicy(size=96, blur_probability=1.0),
    ViewPolicy(size=96, blur_probability=0.1, solarize_probability=0.2),
)


def lightly_options(policy: ViewPolicy) -> dict[str, Any]:
    """What lightly's transforms call the numbers of a view that all of them take."""
    return {
        "input_size": policy.size,
        "cj_prob": policy.jitter_probability,
        "cj_strength": 1.0,
        "cj_bright": policy.brightness,
        "cj_contrast": policy.contrast,
        "cj_sat": policy.saturation,
        "cj_hue": policy.hue,
        "min_scale": policy.crop_scale[0],
        "random_gray_scale": policy.grey_probability,
        "sigmas": policy.blur_sigma,
    }


def lightly_transform() -> Any:
    """Lightly's two views of BYOL with the numbers of `VIEWS`. Raises ImportError without lightly."""
    module = importlib.import_module("lightly.transforms.byol_transform")

    def view(kind: str, policy: ViewPolicy) -> Any:
        return getattr(module, kind)(
            **lightly_options(policy),
            gaussian_blur=policy.blur_probability,
            solarization_prob=policy.solarize_probability,
        )

    first, second = view("BYOLView1Transform", VIEWS[0]), view("BYOLView2Transform", VIEWS[1])
    return module.BYOLTransform(view_1_transform=first, view_2_transform=second)


@dataclass(frozen=True)
class Cost:
    """Of so many images: seconds by the clock, and of processors."""

    images: int
    wall: float
    processor: float

    def record(self) -> dict[str, float]:
        """Images a second by the clock, and by each core that is busy."""
        return {"images_per_second": self.images / self.wall, "images_per_core_second": self.images / self.processor}


def processor_seconds(process: int) -> float:
    """Processor time that a process has taken so far."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def descendants(process: int) -> list[int]:
    """The processes that a process has started, and those that these have."""
    found: list[int] = []
    for task in Path(f"/proc/{process}/task").iterdir():
        for child in map(int, (task / "children").read_text(encoding="utf-8").split()):
            found += [child, *descendants(child)]
    return found


def cost_of(function: Callable[[], int]) -> Cost:
    """Of a function that returns how many images it has made, with all processes below this one."""
    processes = [os.getpid(), *descendants(os.getpid())]
    before, start = sum(map(processor_seconds, processes)), time.perf_counter()
    images = function()
    wall = time.perf_counter() - start
    return Cost(images, wall, sum(map(processor_seconds, processes)) - before)


def lightly_side(folder: Path, workers: int, batch: int) -> Callable[[], int]:
    """An epoch of lightly's views by a DataLoader, whose workers are started here. Raises ImportError without it."""
    loader = DataLoader(
        ImageFolder(folder, transform=lightly_transform()),
        batch_size=batch,
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
    )

    def epoch() -> int:
        return sum(len(views[0]) for views, _ in loader)

    epoch()
    return epoch


def crops_alone(images: Images, workers: Workers, batch: int) -> Callable[[], int]:
    """An epoch of what workers make, without the part that is computed on the device."""
    loader = Loader(images, VIEWS, workers)

    def epoch() -> int:
        begun = [loader.begin(indices, seed) for seed, indices in enumerate(torch.randperm(len(images)).split(batch))]
        return sum(len(part.result().crops[0]) for waiting in begun for part in _forgotten(loader, waiting))

    epoch()
    return epoch


def _forgotten(loader: Loader, begun: Any) -> Any:
    loader.workers.in_flight -= begun.nbytes
    return begun.parts


def whole(images: Images, workers: Workers, batch: int) -> Callable[[], int]:
    """An epoch of finished views: crops by workers, and the rest in this process while they go on."""
    loader = Loader(images, VIEWS, workers)

    def epoch() -> int:
        chosen = torch.randperm(len(images)).split(batch)
        begun = [loader.begin(indices, seed) for seed, indices in enumerate(chosen)]
        return sum(len(loader.finish(waiting)[0][0]) for waiting in begun)

    epoch()
    return epoch


def measure(sides: Mapping[str, Callable[[], int]], repeats: int) -> dict[str, list[Cost]]:
    """The costs of an epoch by each side, one after another in every repeat."""
    found: dict[str, list[Cost]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, epoch in sides.items():
            found[name].append(cost_of(epoch))
    return found
