"""Stage 2: the downstream head on the frozen backbone."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bilevel import Level
from bilevel.training import Callback, SingleLevelTrainer, derive_seed, gradient_of

from ....experiment.artifacts import Artifact, make_key
from ....experiment.events import StageEvents
from ....experiment.stage import Attempt, CachedStage
from ....experiment.stage_training import run_training
from ....experiment.workspace import Workspace
from ....vision.networks.backbones import build_backbone
from ....vision.optimizers import schedule
from ...settings.plan import batches_per_epoch
from ...settings.sections import HOW_READ
from ..compute import Computing, JoinBuffers
from ..costs import Costs, costs_of
from ..datasets import Datasets, resolution
from ..image_batches import Batches
from ..problem import trainable
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
        epochs, costs: what it took.
    """

    modules: dict[str, nn.Module]
    primary_metric: str
    higher_is_better: bool
    values: dict[str, float]
    epochs: int
    costs: Costs


def run(repeat: Repeat, data: Datasets, computing: Computing, workspace: Workspace, parent: Artifact) -> Artifact:
    """Train a fresh head phi_D on the backbone of a pretext artifact.

    The result holds the pretext modules as they were, the head, and as "upper_backbone" the backbone that theta_D
    starts from: the same weights, with the running statistics that the switch head.batch_norm leaves.
    """
    before = costs_of(parent)

    def made(attempt: Attempt) -> tuple[dict[str, nn.Module], dict[str, Any]]:
        warmed = fit(repeat, data, computing, workspace, parent, attempt)
        costs = before + warmed.costs
        images = data.facts(parent, pretext=False, labelled=True)
        return warmed.modules, {**costs.facts(), "seed": repeat.seed, **images}

    return CachedStage(workspace.store, STAGE, _key(repeat, parent, data)).run(made)


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
    variables, section = trainable(head), settings.head
    optimizer = torch.optim.SGD(list(variables.values()), section.lr, 0.9, weight_decay=section.weight_decay)
    total = section.epochs * batches_per_epoch(len(sets.train), settings.downstream.batch_size)
    stack, events = batches.labelled(task, STAGE, total), repeat.events(STAGE, workspace)
    scheduler = schedule(optimizer, "constant", total_steps=total)
    backbone.train(section.batch_norm == "train")
    model = SupervisedModel(task, backbone, head, computing)
    validation = _Validation(model, batches.evaluation(sets.val, task), len(stack), events, attempt)
    trainer, seconds = run_training(
        lambda callbacks: SingleLevelTrainer(
            gradient_of(model.loss, variables),
            Level(variables, optimizer, stack, scheduler=scheduler),
            total,
            parts={"backbone": backbone, "head": head},
            callbacks=callbacks,
            nonfinite_skips=settings.nonfinite_skips,
        ),
        f"head warm-up, seed {repeat.seed}",
        events=events,
        attempt=attempt,
        workspace=workspace,
        checkpoint_every=max(1, total // 4),
        callbacks=(JoinBuffers(computing, backbone, head), validation),
    )
    modules = {"backbone": original, "heads": heads, "upper_backbone": backbone, "head": head}
    metric, measure = next(iter(model.metrics.items()))
    costs = Costs(label_steps=total, seconds=seconds, skipped_label_steps=trainer.skipped.total())
    return Warmed(modules, metric, measure.higher_is_better, validation.values, section.epochs, costs)


class _Validation(Callback):
    """Scores the model after every epoch; `values` are those of the last one."""

    def __init__(
        self, model: SupervisedModel, batches: Iterable[Any], epoch: int, events: StageEvents, attempt: Attempt
    ) -> None:
        self.model, self.batches, self.epoch, self.events, self.attempt = model, batches, epoch, events, attempt
        self.values: dict[str, float] = {}

    def on_progress(self, trainer: Any) -> None:
        step = trainer.progress
        if step % self.epoch == 0:
            self.values = self.model.measure(self.batches)
            named = {f"val_{name}": value for name, value in self.values.items()}
            self.events.write({"event": "epoch", "step": step, "epoch": step // self.epoch, **named})
            self.attempt.report(step // self.epoch, self.values[next(iter(self.model.metrics))])

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.values = dict(state["values"])


def _key(repeat: Repeat, parent: Artifact, data: Datasets) -> str:
    settings = repeat.settings
    return make_key(
        STAGE,
        repeat.seed,
        parent,
        settings.data.model_dump(exclude=HOW_READ | {"pretext", "pretext_limit"})
        | resolution(data.downstream.train, data.downstream.val),
        data.identity.labelled,
        settings.downstream.model_dump(exclude={"eval_batch_size"}),
        settings.head.model_dump(),
        settings.compute.decisive("micro_batch"),
    )
