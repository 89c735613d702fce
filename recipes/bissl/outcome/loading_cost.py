"""What reading and cropping images costs, measured on a few of them, beside what computing on them does."""

import time
from dataclasses import dataclass

import torch

from ...vision.imagesets import ImageSet
from ...vision.pipeline.loader import Loader, View
from ...vision.pipeline.workers import Workers
from ..settings.config import Config
from ..settings.plan import Plan
from ..training.compute import Computing
from ..training.datasets import Datasets

MEASURED = 32
"""Images that are read and cropped to measure by."""


@dataclass(frozen=True)
class ImageCost:
    """Seconds that one image of a batch takes.

    Attributes:
        loading: to be read and cropped, in one process.
        finishing: for the rest of its views, on the device.
        workers: processes that load at the same time, beside computing; 0: the process that computes does.
    """

    loading: float
    finishing: float
    workers: int


@dataclass(frozen=True)
class LoadingCost:
    """Those of a pretext image and of a labelled one."""

    pretext: ImageCost
    labelled: ImageCost

    def seconds(self, pretext: float, labelled: float) -> tuple[float, float]:
        """For so many images of each: seconds of loading beside computing, and what computing takes longer."""
        beside = added = 0.0
        for cost, count in ((self.pretext, pretext), (self.labelled, labelled)):
            if cost.workers:
                beside += cost.loading * count / cost.workers
            else:
                added += cost.loading * count
            added += cost.finishing * count
        return beside, added

    def line(self) -> str:
        """What was measured."""
        told = [
            f"{1e3 * (cost.loading + cost.finishing):.3g} ms a {what} image, {1e3 * cost.loading:.3g} of them for "
            f"reading and cropping by {'the process that computes' if not cost.workers else _workers(cost.workers)}"
            for what, cost in (("pretext", self.pretext), ("labelled", self.labelled))
        ]
        return f"loading, measured on {MEASURED} images at most: " + "; ".join(told)


def measure_loading(config: Config, data: Datasets, device: torch.device) -> LoadingCost:
    """Read, crop and finish a few images of the pretext and of the training set.

    Raises:
        DataError: one cannot be read.
    """
    computing, sets = Computing(config.compute, device), data.downstream
    pretext, downstream = config.pretext_task(), config.downstream_task(sets.train.classes)
    return LoadingCost(
        _measured(data, data.pretext, pretext.random_views() or (pretext.image_size,), computing),
        _measured(data, sets.train, (downstream.train_view() or downstream.image_size,), computing),
    )


def loaded_images(config: Config, plan: Plan, images: int, labelled: int) -> tuple[int, int]:
    """Pretext and labelled images that an arm loads in one repeat of the pipeline, evaluations left out."""
    tunings = 1 if config.pipeline_seeds else config.seeds
    pretext = min(config.pretext.batch_size, images) * plan.pretext_steps
    steps = plan.head + plan.upper + tunings * plan.finetune
    return pretext, min(config.downstream.batch_size, labelled) * steps


def _measured(data: Datasets, images: ImageSet, views: tuple[View, ...], computing: Computing) -> ImageCost:
    masks = images.labels if images.kind == "segmentation" else None
    array = data.on_device(images, computing) if masks is None else None
    with_workers = Loader(images.images, views, Workers(0), transfer=computing.transfer, masks=masks, array=array)
    chosen = torch.linspace(0, len(images) - 1, min(MEASURED, len(images))).round().to(torch.int64)
    threads = torch.get_num_threads()
    # As a worker has; the first time is left out, in which libraries are loaded.
    torch.set_num_threads(1)
    try:
        _seconds(with_workers, chosen, computing.device)
        loading, finishing = _seconds(with_workers, chosen, computing.device)
    finally:
        torch.set_num_threads(threads)
    return ImageCost(
        loading / len(chosen), finishing / len(chosen), 0 if images.images.in_memory else data.workers.count
    )


def _seconds(loader: Loader, chosen: torch.Tensor, device: torch.device) -> tuple[float, float]:
    """Of loading some images, and of finishing their views."""
    began = time.perf_counter()
    for part in loader.begin(chosen).parts:
        part.result()
    loaded = time.perf_counter() - began
    loader.make(chosen)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    # Both times the images are loaded.
    return loaded, max(0.0, time.perf_counter() - began - 2 * loaded)


def _workers(count: int) -> str:
    return f"each of {count} worker processes" if count > 1 else "one worker process"
