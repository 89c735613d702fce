"""Stage 2: the downstream head on the frozen backbone."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bilevel.training import derive_seed

from ....experiment.artifacts import Artifact, make_key
from ....experiment.stage import Attempt, CachedStage
from ....experiment.workspace import Workspace
from ....vision.networks.backbones import build_backbone
from ....vision.optimizers import schedule
from ..batches import Batches
from ..compute import Computing
from ..costs import Costs, costs_of
from ..datasets import Datasets
from ..loop import run_steps
from ..repeat import Repeat
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


def run(repeat: Repeat, data: Datasets, computing: Computing, workspace: Workspace, parent: Artifact) -> Artifact:
    """Train a fresh head phi_D on the backbone of a pretext artifact.

    The result holds the pretext modules as they were, the head, and as "upper_backbone" the backbone that theta_D
    starts from: the same weights, with the running statistics that the switch head.batch_norm leaves.
    """
    before = costs_of(parent)

    def made(attempt: Attempt) -> tuple[dict[str, nn.Module], dict[str, Any]]:
        warmed = fit(repeat, data, computing, workspace, parent, attempt)
        costs = before + Costs(label_steps=warmed.steps, seconds=warmed.seconds)
        return warmed.modules, {**costs.facts(), "seed": repeat.seed}

    return CachedStage(workspace.store, STAGE, _key(repeat, parent)).run(made)


def fit(
    repeat: Repeat, data: Datasets, computing: Computing, workspace: Workspace, parent: Artifact, attempt: Attempt
) -> Warmed:
    """Train as `run` does, and keep nothing but checkpoints.

    Raises:
        NonFiniteError: a training loss or gradient is not finite.
    """
    settings, sets, batches = repeat.settings, data.downstream, Batches(repeat, data, computing)
    torch.manual_seed(derive_seed(repeat.seed, STAGE))
    task, pretext = settings.downstream_task(sets.train.classes), settings.pretext_task()
    name, size = settings.model.backbone, settings.data.image_size
    original, backbone = build_backbone(name, image_size=size), build_backbone(name, image_size=size)
    heads, head = pretext.build(original), task.build(backbone)
    parent.load_into({"backbone": original, "heads": heads})
    parent.load_into({"backbone": backbone})
    computing.place(backbone).requires_grad_(False)
    computing.place(head)
    optimizer = torch.optim.SGD(
        head.parameters(), lr=settings.head.lr, momentum=0.9, weight_decay=settings.head.weight_decay
    )
    stack, events = batches.labelled(task, STAGE), repeat.events(STAGE, workspace)
    total = settings.head.epochs * len(stack)
    scheduler = schedule(optimizer, "constant", total_steps=total)
    validation = batches.evaluation(sets.val, task)
    backbone.train(settings.head.batch_norm == "train")
    model = SupervisedModel(task, backbone, head, computing)
    values: dict[str, float] = {}

    def after(number: int) -> None:
        if number % len(stack) == 0:
            values.update(model.measure(validation))
            named = {f"val_{name}": value for name, value in values.items()}
            events.write({"event": "epoch", "step": number, "epoch": number // len(stack), **named})

    seconds = run_steps(
        lambda: model.step(stack.next(), optimizer, scheduler),
        total=total,
        parts={"backbone": backbone, "head": head, "optimizer": optimizer, "scheduler": scheduler, "stack": stack},
        writer=events,
        attempt=attempt,
        checkpoint_every=max(1, total // 4),
        console=workspace.console,
        description=f"head warm-up, seed {repeat.seed}",
        after=after,
        nonfinite_skips=settings.nonfinite_skips,
    )
    modules = {"backbone": original, "heads": heads, "upper_backbone": backbone, "head": head}
    metric, measure = next(iter(model.metrics.items()))
    return Warmed(modules, metric, measure.higher_is_better, values, settings.head.epochs, total, seconds)


def _key(repeat: Repeat, parent: Artifact) -> str:
    settings = repeat.settings
    return make_key(
        STAGE,
        repeat.seed,
        parent,
        settings.data.model_dump(exclude={"root", "download", "pretext", "pretext_limit"}),
        settings.downstream.model_dump(exclude={"eval_batch_size"}),
        settings.head.model_dump(),
        settings.compute.model_dump(exclude={"data_device", "micro_batch"}),
    )
