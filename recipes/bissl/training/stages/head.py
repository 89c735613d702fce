"""Stage 2: the downstream head on the frozen backbone."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bilevel.training import derive_seed

from ....experiment.artifacts import Artifact, make_key
from ....vision.networks.backbones import build_backbone
from ....vision.optimizers import schedule
from ..context import Context
from ..loop import discard_checkpoints, run_steps
from ..supervised import SupervisedModel

STAGE = "head"


@dataclass(frozen=True)
class Warmed:
    """A finished warm-up.

    Attributes:
        modules: what the artifact holds, by name.
        primary_metric, higher_is_better: how `values` compare.
        values: validation metrics and loss after the last epoch.
        epochs, steps, seconds: what it took.
    """

    modules: dict[str, nn.Module]
    primary_metric: str
    higher_is_better: bool
    values: dict[str, float]
    epochs: int
    steps: int
    seconds: float


def run(context: Context, artifact: Artifact) -> Artifact:
    """Train a fresh head phi_D on the backbone of a pretext artifact.

    The result holds the pretext modules as they were, the head, and as "upper_backbone" the backbone that theta_D
    starts from: the same weights, with the running statistics that the switch head.batch_norm leaves.
    """
    key = _key(context, artifact)
    finished = context.store.find(STAGE, key)
    if finished is not None:
        return finished
    directory = context.store.directory(STAGE, key)
    warmed = fit(context, artifact, directory)
    info = {
        "pretext_steps": artifact.info["pretext_steps"],
        "label_steps": warmed.steps,
        "seconds": artifact.info["seconds"] + warmed.seconds,
        "seed": context.seed,
    }
    result = context.store.save(STAGE, key, warmed.modules, info)
    discard_checkpoints(directory)
    return result


def fit(context: Context, artifact: Artifact, directory: Path, *, check: Callable[[], None] | None = None) -> Warmed:
    """Train as `run` does, and keep nothing but checkpoints.

    Args:
        directory: where checkpoints lie; they are left there.
        check: called before each step; what it raises stops the training, which a later call continues.

    Raises:
        NonFiniteError: a training loss or gradient is not finite.
    """
    config, sets = context.config, context.data.downstream
    torch.manual_seed(derive_seed(context.seed, STAGE))
    task, pretext = config.downstream_task(sets.train.classes), config.pretext_task()
    name, size = config.model.backbone, config.data.image_size
    original, backbone = build_backbone(name, image_size=size), build_backbone(name, image_size=size)
    heads, head = pretext.build(original), task.build(backbone)
    artifact.load_into({"backbone": original, "heads": heads})
    artifact.load_into({"backbone": backbone})
    context.computing.place(backbone).requires_grad_(False)
    context.computing.place(head)
    optimizer = torch.optim.SGD(
        head.parameters(), lr=config.head.lr, momentum=0.9, weight_decay=config.head.weight_decay
    )
    stack, writer = context.labelled_stack(task, STAGE), context.writer(STAGE)
    total = config.head.epochs * len(stack)
    scheduler = schedule(optimizer, "constant", total_steps=total)
    validation = context.evaluation_batches(sets.val, task)
    backbone.train(config.head.batch_norm == "train")
    model = SupervisedModel(task, backbone, head, context.computing)
    values: dict[str, float] = {}

    def step() -> dict[str, Any]:
        if check is not None:
            check()
        return model.step(stack.next(), optimizer, scheduler)

    def after(number: int) -> None:
        if number % len(stack) == 0:
            values.update(model.measure(validation))
            named = {f"val_{name}": value for name, value in values.items()}
            writer.write({"event": "epoch", "step": number, "epoch": number // len(stack), **named})

    seconds = run_steps(
        step,
        total=total,
        parts={"backbone": backbone, "head": head, "optimizer": optimizer, "scheduler": scheduler, "stack": stack},
        writer=writer,
        directory=directory,
        checkpoint_every=max(1, total // 4),
        console=context.console,
        description=f"head warm-up, seed {context.seed}",
        after=after,
        nonfinite_skips=config.nonfinite_skips,
    )
    modules = {"backbone": original, "heads": heads, "upper_backbone": backbone, "head": head}
    metric, measure = next(iter(model.metrics.items()))
    return Warmed(modules, metric, measure.higher_is_better, values, config.head.epochs, total, seconds)


def _key(context: Context, artifact: Artifact) -> str:
    config = context.config
    return make_key(
        STAGE,
        context.seed,
        artifact,
        config.data.model_dump(exclude={"root", "download", "pretext", "pretext_limit"}),
        config.downstream.model_dump(exclude={"eval_batch_size"}),
        config.head.model_dump(),
        config.compute.model_dump(exclude={"data_device", "micro_batch"}),
    )
