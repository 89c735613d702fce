"""How much of loading is hidden behind what consumes the batches."""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.loading.sides import descendants, processor_seconds
from recipes.bissl.settings.config import build_config
from recipes.bissl.settings.presets import PRESETS
from recipes.bissl.training.compute import Computing
from recipes.bissl.training.costs import artifact_store
from recipes.bissl.training.datasets import Datasets
from recipes.bissl.training.image_batches import Batches
from recipes.bissl.training.repeat import Repeat
from recipes.bissl.training.stages import bissl, head, pretext
from recipes.experiment.artifacts import Artifact
from recipes.experiment.workspace import Workspace
from recipes.vision.pictures.base import Images
from recipes.vision.pipeline.loader import Loader
from recipes.vision.pipeline.stream import PrefetchedStack, order_of
from recipes.vision.pipeline.workers import Workers
from recipes.vision.views.view_policy import ViewPolicy

CROPS = ViewPolicy(size=96, jitter_probability=0.0, grey_probability=0.0)
"""A view of which this process has next to nothing to compute: that would be consuming, not loading."""
SHARES = (0.5, 1.0, 2.0)
"""What a step consumes, in the time that its loading takes."""


def _stack(images: Images, workers: Workers, batch: int, total: int) -> PrefetchedStack[Any]:
    loader = Loader(images, (CROPS,), workers)
    return PrefetchedStack(
        order_of(len(images), batch, seed=0, drop_last=True),
        loader.begin,
        lambda begun, seed: loader.finish(begun)[0],
        loader.give_up,
        total=total,
        room=loader.room,
    )


def _seconds_a_step(images: Images, workers: Workers, batch: int, steps: int, consuming: float) -> float:
    """Of `steps` steps after the first two, whose batches nobody has begun before."""
    stack = _stack(images, workers, batch, steps + 2)
    start = 0.0
    for step in range(steps + 2):
        if step == 2:
            start = time.perf_counter()
        stack.next()
        time.sleep(consuming)
    return (time.perf_counter() - start) / steps


def sleeping(images: Images, workers: int, batch: int, steps: int, repeats: int) -> list[dict[str, float]]:
    """A step's time over the longer of loading and consuming, for consumers that sleep; the median repeat of each."""
    processes, rows = Workers(workers), []
    try:
        _seconds_a_step(images, processes, batch, 1, 0.0)
        for share in SHARES:
            found = []
            for _ in range(repeats):
                loading = _seconds_a_step(images, processes, batch, steps, 0.0)
                step = _seconds_a_step(images, processes, batch, steps, share * loading)
                again = _seconds_a_step(images, processes, batch, steps, 0.0)
                loading, consuming = (loading + again) / 2, share * loading
                row = {"loading": loading, "consuming": consuming, "step": step}
                found.append(row | {"ratio": step / max(loading, consuming)})
            rows.append({"share": share, **sorted(found, key=lambda row: row["ratio"])[len(found) // 2]})
    finally:
        processes.close()
    return rows


def _config(folder: Path, quick: bool) -> Any:
    fields: dict[str, Any] = {
        "threads": 1,
        "device": "cpu",
        "data": {
            "pretext": f"folder:{folder}",
            "downstream": f"folder:{folder}",
            "image_size": 32,
            "labels_per_class": None,
            "val_per_class": None,
            "storage": "stream",
            "num_workers": 1,
        },
        "model": {"backbone": "resnet-tiny"},
        "pretext": {"batch_size": 16 if quick else 32, "epochs": 1, "warmup_epochs": 0},
        "downstream": {"batch_size": 8 if quick else 32},
        "head": {"epochs": 1},
        "bissl": {
            "alternations": 1,
            "lower_steps": 4 if quick else 20,
            "upper_steps": 2 if quick else 8,
            "solver_iterations": 2,
            "solver_rtol": None,
        },
    }
    return build_config(PRESETS["images"]("v2"), fields)


def alternation(folder: Path, quick: bool) -> dict[str, float]:
    """The bilevel stage of the recipe on a streamed folder, one thread and one worker.

    Loading is the processor time of the worker, computing the time in which the training does not wait for data.
    """
    config = _config(folder, quick)
    data, computing = Datasets(config), Computing(config.with_crops("uint8").compute, torch.device("cpu"))
    repeat = Repeat.of(config.with_crops("uint8"), "bissl", 0)
    with tempfile.TemporaryDirectory() as place:
        workspace = Workspace(Path(place), artifact_store(Path(place)), Console(quiet=True))
        parent: Artifact = pretext.run(repeat, data, computing, workspace)
        warmed = head.run(repeat, data, computing, workspace, parent)
        problem = bissl.make_problem(repeat.settings, data.downstream.train.classes, warmed, computing)
        trainer = bissl.make_trainer(repeat.settings, problem, Batches(repeat, data, computing))
        workers = descendants(os.getpid())
        before, start = sum(map(processor_seconds, workers)), time.perf_counter()
        trainer.run()
        total = time.perf_counter() - start
        loading = sum(map(processor_seconds, workers)) - before
    data.workers.close()
    computing_time = total - trainer.waited
    return {
        "total": total,
        "loading": loading,
        "computing": computing_time,
        "waiting": trainer.waited,
        "ratio": total / max(loading, computing_time),
    }
