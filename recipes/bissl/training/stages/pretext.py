"""Stage 1: self-supervised training of the backbone and the pretext heads."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bilevel import Level
from bilevel.problem import split
from bilevel.products import micro_batched_gradient
from bilevel.training import Callback, Derivatives, SingleLevelTrainer, derive_seed, gradient_of
from bilevel.tree import Params

from ....experiment.artifacts import Artifact, make_key
from ....experiment.events import StageEvents
from ....experiment.stage import Attempt, CachedStage
from ....experiment.stage_training import run_training
from ....experiment.workspace import Workspace
from ....vision.losses import embedding_spread
from ....vision.metrics import knn_accuracy
from ....vision.networks.backbones import build_backbone
from ....vision.networks.foreign_weights import load_backbone, load_heads
from ....vision.networks.weight_files import ForeignWeights
from ....vision.optimizers import schedule
from ....vision.pipeline.loader import UnderWay
from ....vision.pipeline.stream import PrefetchedStack
from ....vision.shards import on_shards
from ...settings.config import Config
from ...settings.plan import lower_warmup, make_plan
from ...tasks.base import PretextTask
from ..compute import Computing, JoinBuffers
from ..costs import Costs, costs_of
from ..datasets import Datasets, resolution
from ..given_weights import initial_weights
from ..global_loss import pretext_loss, pretext_output_loss
from ..image_batches import LOWER_DATA, PRETEXT_IMAGES, Batches
from ..keep_record import KeepRecord
from ..problem import bind_lower, lower_variables
from ..repeat import Repeat
from . import projector

STAGE, RESTART = "pretext", "restart"


@dataclass(frozen=True)
class _Length:
    """Steps, peak learning rate, steps of warm-up, and steps before them that fit heads to given weights."""

    steps: int
    lr: float
    warmup: int
    projector: int = 0


@dataclass(frozen=True)
class _Start:
    """What training starts from: an artifact, the weights of a file, or (neither) random weights."""

    parent: Artifact | None = None
    weights: ForeignWeights | None = None


@dataclass(frozen=True)
class _Modules:
    """The task and the networks that it trains."""

    task: PretextTask
    backbone: nn.Module
    heads: nn.ModuleDict

    def train(self, mode: bool = True) -> None:
        """Set both to train mode, or to eval mode."""
        self.backbone.train(mode)
        self.heads.train(mode)


def run(
    repeat: Repeat, data: Datasets, computing: Computing, workspace: Workspace, *, steps: int | None = None
) -> Artifact:
    """Train for as long as the repeat's variant asks, or for `steps`.

    Weights are random, or those of model.init_backbone; then heads that the file lacks are fitted to them first.
    """
    settings, batches = repeat.settings, Batches(repeat, data, computing)
    plan = make_plan(settings, repeat.variant, len(data.pretext), 0)
    length = _Length(steps or plan.pretext, plan.pretext_lr, plan.warmup, plan.projector)
    stack = batches.pretext(settings.pretext_task(), STAGE, length.steps)
    start = _Start(weights=initial_weights(settings.model))
    key = _key(repeat, STAGE, start, length, data)
    return CachedStage(workspace.store, STAGE, key).run(
        lambda attempt: _fit(repeat, STAGE, start, length, stack, batches, workspace, attempt)
    )


def restart(repeat: Repeat, data: Datasets, computing: Computing, workspace: Workspace, parent: Artifact) -> Artifact:
    """Go on from a pretext artifact with the lower level's steps, schedule and batches, without an upper level."""
    c, batches = repeat.settings.bissl, Batches(repeat, data, computing)
    steps = c.alternations * c.lower_steps
    stack = batches.pretext(repeat.settings.pretext_task(), LOWER_DATA, steps, c.pretext_fraction)
    length = _Length(steps, c.lower_lr, lower_warmup(repeat.settings, len(stack)))
    start = _Start(parent=parent)
    key = _key(repeat, RESTART, start, length, data)
    return CachedStage(workspace.store, RESTART, key).run(
        lambda attempt: _fit(repeat, RESTART, start, length, stack, batches, workspace, attempt)
    )


def _fit(
    repeat: Repeat,
    stage: str,
    start: _Start,
    length: _Length,
    stack: PrefetchedStack[UnderWay],
    batches: Batches,
    workspace: Workspace,
    attempt: Attempt,
) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """The trained modules, and the facts of the artifact."""
    settings, computing, before = repeat.settings, batches.computing, costs_of(start.parent)
    torch.manual_seed(derive_seed(repeat.seed, stage))
    modules, heads_fit = _modules(settings, start, workspace)
    task, backbone, heads = modules.task, modules.backbone, modules.heads
    if length.projector and not heads_fit:
        assert start.weights is not None, "random heads go with random weights"
        fitted = projector.run(repeat, batches, workspace, start.weights, length.projector)
        fitted.load_into({"backbone": backbone, "heads": heads})
        before = costs_of(fitted)
        # Whether that was computed now or found.
        torch.manual_seed(derive_seed(repeat.seed, stage, "after heads"))
    computing.place(backbone)
    computing.place(heads)
    modules.train()
    variables, floor = lower_variables(backbone, heads), settings.pretext.lr_floor
    optimizer = task.optimizer(list(variables.values()), length.lr, settings.pretext.weight_decay)  # type: ignore[arg-type]
    scheduler = schedule(optimizer, total_steps=max(1, length.steps), warmup_steps=length.warmup, floor=floor)
    events = repeat.events(stage, workspace)
    trainer, seconds = run_training(
        lambda callbacks: SingleLevelTrainer(
            _derivatives(modules, variables, computing),
            Level(variables, optimizer, stack, scheduler=scheduler),
            length.steps,
            parts={"backbone": backbone, "heads": heads},
            callbacks=callbacks,
            nonfinite_skips=settings.nonfinite_skips,
        ),
        f"{stage}, {repeat.variant}, seed {repeat.seed}",
        events=events,
        attempt=attempt,
        workspace=workspace,
        checkpoint_every=settings.pretext.checkpoint_every * len(stack),
        callbacks=(
            *(JoinBuffers(computing, backbone, heads), _Monitor(modules, batches, len(stack), events)),
            KeepRecord(batches.data.identity),
        ),
    )
    skipped, weights = trainer.skipped.total(), start.weights
    costs = before + Costs(pretext_steps=length.steps, seconds=seconds, skipped_pretext_steps=skipped)
    initial = None if weights is None else {"file": weights.path.name, "sha256": weights.sha256}
    images = batches.data.facts(start.parent, pretext=True, labelled=False)
    facts = {**costs.facts(), **repeat.facts(), **images, "initial_weights": initial}
    return {"backbone": backbone, "heads": heads}, facts


def _modules(settings: Config, start: _Start, workspace: Workspace) -> tuple[_Modules, bool]:
    """The networks, and whether the heads fit the backbone as well as they should."""
    model, task = settings.model, settings.pretext_task()
    size, zero = settings.data.image_size, model.zero_init_residual
    backbone = build_backbone(model.backbone, image_size=size, zero_init_residual=zero)
    if start.weights is not None:
        # Before the heads are made, which may hold a copy of the backbone.
        line = load_backbone(start.weights, backbone, model.backbone)
        workspace.console.print(line, markup=False, highlight=False, soft_wrap=True)
    heads = task.build(backbone)
    if start.parent is not None:
        start.parent.load_into({"backbone": backbone, "heads": heads})
    fit = start.weights is None or load_heads(start.weights, heads)
    return _Modules(task, backbone, heads), fit


def _key(repeat: Repeat, stage: str, start: _Start, length: _Length, data: Datasets) -> str:
    settings, weights = repeat.settings, start.weights
    shared = [] if stage == STAGE else [settings.bissl.pretext_fraction]
    # By its content: the same file elsewhere makes the same artifact. Any arm fits heads at the warm-up's rate.
    given = [] if weights is None else [weights.sha256, length.projector, settings.pretext.lr]
    return make_key(
        stage,
        repeat.seed,
        start.parent,
        settings.data.model_dump(include=PRETEXT_IMAGES) | resolution(data.pretext),
        data.identity.pretext,
        settings.model.model_dump(include={"backbone", "zero_init_residual"}),
        settings.pretext.step_settings(),
        [length.steps, length.lr, length.warmup, *shared, *given],
        settings.compute.decisive(),
    )


def _derivatives(modules: _Modules, variables: Params, computing: Computing) -> Derivatives:
    """Loss and gradient on a batch, in chunks of compute.micro_batch or at once."""
    task, backbone, heads = modules.task, modules.backbone, modules.heads
    size = computing.fields.micro_batch
    if size is None:
        loss = computing.first_order(lambda batch: pretext_loss(task, backbone, dict(heads.items()), batch))
        return gradient_of(loss, variables)
    outputs = computing.first_order(lambda lower, chunk: task.outputs(*bind_lower(backbone, heads, lower), chunk))
    whole = partial(pretext_output_loss, task)
    return lambda batch: micro_batched_gradient(outputs, whole, variables, split(batch, size))


class _Monitor(Callback):
    """Does what the task does after every step, and looks at the networks now and then and after the last step."""

    def __init__(self, modules: _Modules, batches: Batches, epoch: int, events: StageEvents) -> None:
        self.modules, self.batches, self.epoch, self.events = modules, batches, epoch, events
        self.every = batches.settings.pretext.monitor_every * epoch

    def on_progress(self, trainer: Any) -> None:
        modules, step = self.modules, trainer.progress
        modules.task.after_step(modules.backbone, modules.heads, step)
        if step % self.every == 0 or step == trainer.total:
            seen = _look(modules, self.batches)
            self.events.write({"event": "monitor", "step": step, "epoch": step / self.epoch, **seen})


@torch.no_grad()
def _look(modules: _Modules, batches: Batches) -> dict[str, float | None]:
    """k-NN accuracy of the features on the labelled sets, and the spread of the embeddings (0: collapse)."""
    modules.train(False)
    # Always the same images and the same draws, so that only the weights make a difference.
    batch = batches.pretext_sample(modules.task, 512)
    embeddings = modules.task.embed(modules.backbone, dict(modules.heads.items()), batch)
    spread = None if embeddings is None else embedding_spread(embeddings)
    accuracy = _nearest_neighbours(modules.backbone, batches)
    modules.train()
    return {"knn_top1": accuracy, "embedding_spread": spread}


def _nearest_neighbours(backbone: nn.Module, batches: Batches) -> float | None:
    """None where the downstream task has no tensors of images with one class each."""
    sets = batches.data.downstream
    task = batches.settings.downstream_task(sets.train.classes)
    features = []
    for images in (sets.train, sets.val):
        found = []
        for rows, targets in batches.evaluation(images, task):
            if not (isinstance(rows.inputs, Tensor) and isinstance(targets, Tensor) and targets.dtype == torch.int64):
                return None
            found.append((on_shards(backbone, rows), targets))
        features += [torch.cat(parts) for parts in zip(*found, strict=True)]
    if features[1].dim() != 1:
        return None
    neighbours = min(20, max(1, len(sets.train) // len(sets.train.classes)))
    return knn_accuracy(*features, neighbours=neighbours)
