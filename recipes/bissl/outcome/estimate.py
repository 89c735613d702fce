"""What a run will take, without training: sizes of the data, steps, and time measured on a few small batches."""

import time

import torch

from ...vision.errors import DataError
from ...vision.networks.backbones import build_backbone
from ...vision.sources.published.catalog import DATASETS
from ...vision.torch_metrics import as_metrics
from ..settings.arms import METHOD
from ..settings.config import BilevelConfig, Config
from ..settings.plan import Plan, batches_per_epoch, make_plan
from ..training.compute import Computing
from ..training.datasets import Datasets
from ..training.given_weights import check_initial_weights
from ..training.image_batches import Batches, check_batch_size
from ..training.repeat import Repeat
from .loading_cost import loaded_images, measure_loading
from .reading_words import start_lines

PROBE = {"cpu": 16, "cuda": 256}
"""Images that the time of one is measured on: enough to fill the device."""

KNOWN_VAL_FRACTION = 0.2
"""The validation share that the known sizes are for, where a set has no validation part of its own."""

HVP_COST = 4.0
"""Gradients that a Hessian-vector product costs: about 3 in operations, 4 to 5 on a CPU."""


def check_data(config: Config, data: Datasets, computing: Computing) -> None:
    """Read both data sets and make the first batches, so that whatever is wrong is found before anything is written.

    Raises:
        DataError, ConfigError: naming what is wrong.
    """
    check_initial_weights(config.model, config.data.image_size)
    batches = Batches(Repeat(config, METHOD, config.seed), data, computing)
    for fraction in _fractions(config):
        batches.pretext(config.pretext_task(), "check", 0, fraction)
    check_labelled(config, data, computing)


def check_labelled(config: Config, data: Datasets, computing: Computing) -> None:
    """Read the labelled sets alone, and make a stack of batches of them, as `check_data` does; check the metrics.

    Raises:
        DataError, ConfigError, PluginError: naming what is wrong.
    """
    sets = data.downstream
    task = config.downstream_task(sets.train.classes)
    if task.labels not in (None, sets.train.kind):
        raise DataError(
            f"data.downstream: {config.data.downstream!r} has {sets.train.kind} labels, but downstream.task "
            f"{config.downstream.task!r} takes {task.labels} ones; choose another task or source"
        )
    as_metrics(task.metrics())
    Batches(Repeat(config, METHOD, config.seed), data, computing).labelled(task, "check", 0)


def describe(config: Config) -> str:
    """Steps of each arm and a rough time on this machine; of a set of known size no file is opened.

    Raises:
        DataError: data of unknown size are not there.
        ConfigError: a batch is larger than the data.
    """
    images, labelled, data, notes = _sizes(config)
    check_batch_size("downstream.batch_size", config.downstream.batch_size, labelled, "labelled images")
    for fraction in _fractions(config):
        count = round(fraction * images)
        check_batch_size("pretext.batch_size", config.pretext.batch_size, count, "pretext images")
    device = _device(config)
    unit = _seconds_per_image(config, device)
    lines = [
        f"pretext images {images}, batches an epoch {batches_per_epoch(images, config.pretext.batch_size)}; labelled "
        f"images {labelled}, batches an epoch {batches_per_epoch(labelled, config.downstream.batch_size)}"
    ]
    total, loaded = 0.0, (0, 0)
    for arm in config.arms:
        plan = make_plan(config, arm, images, labelled)
        products = _products(config.for_arm(arm).bissl) if plan.upper else 0
        total += unit * _gradients(config, plan, products, images, labelled)
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
    repeats = config.pipeline_seeds or 1
    if data is None:
        lines.append(f"about {_duration(total * repeats)} of computing on this machine, loading left out: {measured}")
        return "\n".join(lines + notes)
    cost = measure_loading(config, data, device)
    beside, added = (repeats * seconds for seconds in cost.seconds(*loaded))
    computing = total * repeats + added
    lines.append(
        f"about {_duration(max(beside, computing))} on this machine{_bottleneck(beside, computing)}: {measured}"
    )
    return "\n".join([*lines, cost.line(), *start_lines(data), *notes])


def _bottleneck(loading: float, computing: float) -> str:
    """Which of the two a run waits for, where images are loaded beside computing."""
    if not loading:
        return ""
    waits, words = (
        ("loading", "more workers, smaller files or data.storage memory help")
        if loading > computing
        else ("computing", "workers have time to spare")
    )
    return (
        f", which is {waits}, the longer of {_duration(loading)} of loading by workers and {_duration(computing)} of "
        f"computing ({words})"
    )


def _fractions(config: Config) -> list[float]:
    """Shares of the pretext images that stages draw batches from: all of them, and the bilevel stage's in each arm."""
    return [1.0, *(config.for_arm(arm).bissl.pretext_fraction for arm in config.arms)]


def _gradients(config: Config, plan: Plan, products: int, images: int, labelled: int) -> float:
    """Gradients of single images that an arm takes in one repeat of the pipeline; a pretext image has two views."""
    pretext = 2 * min(config.pretext.batch_size, images)
    tunings = 1 if config.pipeline_seeds else config.seeds
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


def _sizes(config: Config) -> tuple[int, int, Datasets | None, list[str]]:
    """Pretext and labelled images, the data where all of them were opened, and notes on those that were not."""
    c, notes = config.data, []
    data = Datasets(c.model_copy(update={"download": False}))
    pretext, downstream = DATASETS.get(c.pretext), DATASETS.get(c.downstream)
    if downstream is not None and c.val_fraction != KNOWN_VAL_FRACTION and "val" not in downstream.counts:
        downstream = None
    if pretext is None:
        images = len(data.pretext if downstream is None else data.read_pretext())
    else:
        images = min(pretext.pretext, c.pretext_limit or pretext.pretext)
        notes.append(_published(c.pretext, "pretext"))
    if downstream is None:
        return images, len(data.downstream.train), data if pretext is None else None, notes
    notes.append(_published(c.downstream, "labelled"))
    labelled = downstream.split[0] if c.labels_per_class is None else c.labels_per_class * downstream.classes
    return images, labelled, None, notes


def _published(name: str, what: str) -> str:
    return f"note: the size of {name}, the {what} images, is its published one; no file was opened"


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
