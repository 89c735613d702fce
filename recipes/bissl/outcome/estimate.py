"""What a run will take, without training: sizes of the data, steps, and time measured on a few small batches."""

import time

import torch

from ...vision.networks.backbones import build_backbone
from ...vision.pipeline.workers import available_cores
from ..settings.config import BilevelConfig, Config
from ..settings.plan import Plan, batches_per_epoch, make_plan
from ..training.datasets import Datasets
from .checks import Checked
from .loading_cost import loaded_images, measure_loading
from .reading_words import start_lines
from .side_by_side.workers import worker_count

PROBE = {"cpu": 16, "cuda": 256}
"""Images that the time of one is measured on: enough to fill the device."""

HVP_COST = 4.0
"""Gradients that a Hessian-vector product costs: about 3 in operations, 4 to 5 on a CPU."""


def describe(config: Config, checked: Checked, data: Datasets) -> str:
    """Steps of each arm and a rough time on this machine, for as many images as were `checked`, and what will be read.

    Loading is measured on a few images of `data`, where all sets are on the disk.

    Raises:
        DataError: an image cannot be read.
    """
    images, labelled = checked.pretext, checked.labelled
    device = _device(config)
    unit = _seconds_per_image(config, device)
    lines = [
        f"pretext images {images}, batches an epoch {batches_per_epoch(images, config.pretext.batch_size)}; labelled "
        f"images {labelled}, batches an epoch {batches_per_epoch(labelled, config.downstream.batch_size)}"
    ]
    total, longest, loaded = 0.0, 0.0, (0, 0)
    tunings, repeats = (1, config.pipeline_seeds) if config.pipeline_seeds else (config.seeds, 1)
    for arm in config.arms:
        plan = make_plan(config, arm, images, labelled)
        products = _products(config.for_arm(arm).bissl) if plan.upper else 0
        total += repeats * unit * _gradients(config, plan, products, tunings, images, labelled)
        longest = max(longest, unit * _gradients(config, plan, products, 1, images, labelled))
        more = loaded_images(config, plan, images, labelled)
        loaded = loaded[0] + more[0], loaded[1] + more[1]
        lines.append(
            f"{arm}: pretext {plan.pretext} + lower {plan.lower} = {plan.pretext_steps} pretext steps "
            f"(lr {plan.pretext_lr:g}); head {plan.head} + upper {plan.upper} + fine-tuning {plan.finetune} = "
            f"{plan.label_steps} labelled steps" + _solves(config.for_arm(arm).bissl, products)
        )
    measured = (
        f"{unit * 1e3:.3g} ms an image and gradient measured on {PROBE[device.type]} images on the "
        f"{'CPU' if device.type == 'cpu' else 'GPU'} in float32, {HVP_COST:g} gradients a Hessian-vector product "
        "assumed"
    )
    at_once = _at_once(config, device)
    where = "on this machine" + (f", {at_once} processes side by side" if at_once > 1 else "")
    # No stage begins before those that it goes on from.
    computing = max(total / at_once, longest)
    if not checked.whole:
        lines.append(f"about {_duration(computing)} of computing {where}, loading left out: {measured}")
        return "\n".join([*lines, *checked.notes])
    cost = measure_loading(config, data, device)
    beside, added = (repeats * seconds for seconds in cost.seconds(*loaded))
    computing *= 1.0 + added / total
    lines.append(f"about {_duration(max(beside, computing))} {where}{_bottleneck(beside, computing)}: {measured}")
    return "\n".join([*lines, cost.line(), *start_lines(data), *checked.notes])


def _bottleneck(loading: float, computing: float) -> str:
    """Which of the two a run waits for, where images are loaded beside computing."""
    if not loading:
        return ""
    waits, words = (
        ("loading", "more workers, smaller files, data.cache or data.storage memory help")
        if loading > computing
        else ("computing", "workers have time to spare")
    )
    return (
        f", which is {waits}, the longer of {_duration(loading)} of loading by workers and {_duration(computing)} of "
        f"computing ({words})"
    )


def _at_once(config: Config, device: torch.device) -> int:
    """Processes that compute side by side, each on cores of its own; one on a GPU, which several would share."""
    if device.type != "cpu" or config.threads is None:
        return 1
    return max(1, min(worker_count(config, device), available_cores() // config.threads))


def _gradients(config: Config, plan: Plan, products: int, tunings: int, images: int, labelled: int) -> float:
    """Gradients of single images that an arm takes in one repeat of the pipeline; a pretext image has two views."""
    pretext = 2 * min(config.pretext.batch_size, images)
    labelled_steps = plan.head + 2 * plan.upper + tunings * plan.finetune
    return pretext * (plan.pretext_steps + HVP_COST * products) + labelled_steps * min(
        config.downstream.batch_size, labelled
    )


def _products(fields: BilevelConfig) -> int:
    """At most this many Hessian-vector products on single batches, all solves together, escalation left out."""
    if fields.solver == "identity":
        return 0
    solves = fields.alternations * (1 if fields.aggregate else fields.upper_steps)
    # Layer-wise CG carries no true residual along and takes a product to measure it.
    each = solves * (fields.solver_iterations + fields.layerwise)
    model = fields.alternations * fields.nystrom_rank if fields.solver == "nystrom" else 0
    return fields.hessian_batches * (each + model)


def _solves(fields: BilevelConfig, products: int) -> str:
    if not products:
        return ""
    bound = "" if fields.solver_rtol is None else "at most "
    return f"; {bound}{products} Hessian-vector products on single batches"


def _device(config: Config) -> torch.device:
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def _seconds_per_image(config: Config, device: torch.device) -> float:
    backbone = build_backbone(config.model.backbone, image_size=config.data.image_size).to(device).train()
    side = config.data.image_size
    inputs = torch.zeros(PROBE[device.type], 3, side, side, device=device)

    def gradient() -> float:
        began = time.perf_counter()
        backbone(inputs).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    return sorted(gradient() for _ in range(4))[1] / len(inputs)


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
