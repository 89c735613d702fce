"""What a run will take, without training: sizes of the data, steps, and time measured on a few small batches."""

import time
from collections.abc import Callable

import torch

from recipes.bissl.config import BilevelConfig, Config
from recipes.bissl.context import Context, Datasets, check_batch_size
from recipes.bissl.imagesets import DataError
from recipes.bissl.models import build_backbone
from recipes.bissl.plan import batches_per_epoch, make_plan

KNOWN_SIZES = {"stl10": {"pretext": 100_000, "train": 4_000}}
"""Images of sets that need not be at hand for an estimate (paper, appendix B.1)."""

PROBE = 16
HVP_COST = 4.0
"""Gradients that a Hessian-vector product costs: about 3 in operations, 4 to 5 on a CPU."""


def check_data(context: Context) -> None:
    """Read both data sets and make the first batches, so that whatever is wrong is found before anything is written.

    Raises:
        DataError, ConfigError: naming what is wrong.
    """
    config = context.config
    sets = context.data.downstream
    context.pretext_stack(config.pretext_task(), "check")
    context.labelled_stack(config.downstream_task(sets.train.classes), "check")


def describe(config: Config) -> str:
    """Steps of each arm and a rough time on this machine; nothing is downloaded for it.

    Raises:
        DataError: data of unknown size are not there.
        ConfigError: a batch is larger than the data.
    """
    images, labelled, note = _sizes(config)
    check_batch_size("pretext.batch_size", config.pretext.batch_size, images, "pretext images")
    check_batch_size("downstream.batch_size", config.downstream.batch_size, labelled, "labelled images")
    unit = _seconds_per_image(config)
    lines = [
        f"pretext images {images}, batches an epoch {batches_per_epoch(images, config.pretext.batch_size)}; labelled "
        f"images {labelled}, batches an epoch {batches_per_epoch(labelled, config.downstream.batch_size)}"
    ]
    total = 0.0
    repeats = config.pipeline_seeds or 1
    tunings = 1 if config.pipeline_seeds else config.seeds
    for arm in config.arms:
        plan = make_plan(config, arm, images, labelled)
        pretext_batch = 2 * unit * min(config.pretext.batch_size, images)
        labelled_batch = unit * min(config.downstream.batch_size, labelled)
        seconds = pretext_batch * (plan.pretext + plan.lower + HVP_COST * _products(config.bissl, plan.upper))
        seconds += labelled_batch * (plan.head + 2 * plan.upper + tunings * plan.finetune)
        total += seconds
        lines.append(
            f"{arm}: pretext {plan.pretext} + lower {plan.lower} = {plan.pretext_steps} pretext steps "
            f"(lr {plan.pretext_lr:g}); head {plan.head} + upper {plan.upper} + fine-tuning {plan.finetune} = "
            f"{plan.label_steps} labelled steps"
        )
    lines.append(
        f"about {_duration(total * repeats)} of computing on this machine, augmentation left out: {unit * 1e3:.2f} ms "
        f"an image and gradient measured on {PROBE} images on the CPU, {HVP_COST:g} gradients a Hessian-vector product "
        "assumed"
    )
    return "\n".join(lines + note)


def _products(fields: BilevelConfig, upper_steps: int) -> int:
    """At most this many Hessian-vector products on single batches, all solves together."""
    if fields.solver == "identity":
        return 0
    solves = upper_steps // fields.upper_steps if fields.aggregate else upper_steps
    return solves * fields.solver_iterations * fields.hessian_batches


def _sizes(config: Config) -> tuple[int, int, list[str]]:
    here = config.model_copy(update={"data": config.data.model_copy(update={"download": False})})
    data, note = Datasets(here), []

    def size(source: str, part: str, read: Callable[[], int]) -> int:
        try:
            return read()
        except DataError as error:
            if source not in KNOWN_SIZES:
                raise
            note.append(f"note: {error}")
            return KNOWN_SIZES[source][part]

    images = size(config.data.pretext, "pretext", lambda: len(data.pretext))
    labelled = size(config.data.downstream, "train", lambda: len(data.downstream.train))
    return min(images, config.data.pretext_limit or images), labelled, note


def _seconds_per_image(config: Config) -> float:
    backbone = build_backbone(config.model.backbone).train()
    inputs = torch.zeros(PROBE, 3, config.data.image_size, config.data.image_size)

    def gradient() -> float:
        began = time.perf_counter()
        backbone(inputs).sum().backward()
        return time.perf_counter() - began

    return sorted(gradient() for _ in range(4))[1] / PROBE


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
