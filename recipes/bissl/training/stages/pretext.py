"""Stage 1: self-supervised training of the backbone and the pretext heads."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bilevel import BatchStack
from bilevel.problem import split
from bilevel.products import micro_batched_gradient
from bilevel.training import derive_seed

from ....experiment.artifacts import Artifact, make_key
from ....experiment.stage import Attempt, CachedStage
from ....experiment.workspace import Workspace
from ....vision.losses import embedding_spread
from ....vision.metrics import knn_accuracy
from ....vision.networks.backbones import build_backbone
from ....vision.networks.foreign_weights import ForeignWeights, load_backbone, load_heads
from ....vision.optimizers import schedule
from ....vision.shards import on_shards
from ...settings.config import Config
from ...settings.plan import make_plan
from ...tasks.base import PretextTask
from ..batches import LOWER_DATA, Batches
from ..compute import Computing
from ..costs import Costs, costs_of
from ..datasets import Datasets
from ..global_loss import pretext_loss, pretext_output_loss
from ..loop import gradient_step, optimizer_step, run_steps
from ..problem import bind_lower, lower_variables
from ..repeat import Repeat
from ..warm_start import HeadsFirst, initial_weights

STAGE, RESTART = "pretext", "restart"

Update = Callable[[Any], dict[str, Any]]
"""One optimizer step on a batch; returns its event."""


@dataclass(frozen=True)
class _Length:
    """Steps, peak learning rate, steps of warm-up, and steps before them in which heads alone are fitted."""

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
    stack = batches.pretext(settings.pretext_task(), STAGE)
    start = _Start(weights=initial_weights(settings.model))
    key = _key(repeat, STAGE, start, length)
    return CachedStage(workspace.store, STAGE, key).run(
        lambda attempt: _fit(repeat, STAGE, start, length, stack, batches, workspace, attempt)
    )


def restart(repeat: Repeat, data: Datasets, computing: Computing, workspace: Workspace, parent: Artifact) -> Artifact:
    """Go on from a pretext artifact with the lower level's steps, schedule and batches, without an upper level."""
    c, batches = repeat.settings.bissl, Batches(repeat, data, computing)
    stack = batches.pretext(repeat.settings.pretext_task(), LOWER_DATA, c.pretext_fraction)
    steps = c.alternations * c.lower_steps
    length = _Length(steps, c.lower_lr, min(round(c.lower_warmup_epochs * len(stack)), steps - 1))
    start = _Start(parent=parent)
    key = _key(repeat, RESTART, start, length)
    return CachedStage(workspace.store, RESTART, key).run(
        lambda attempt: _fit(repeat, RESTART, start, length, stack, batches, workspace, attempt)
    )


def _fit(
    repeat: Repeat,
    stage: str,
    start: _Start,
    length: _Length,
    stack: BatchStack,
    batches: Batches,
    workspace: Workspace,
    attempt: Attempt,
) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """The trained modules, and the facts of the artifact."""
    settings, computing, before = repeat.settings, batches.computing, costs_of(start.parent)
    torch.manual_seed(derive_seed(repeat.seed, stage))
    modules, heads_fit = _modules(settings, start, workspace)
    task, backbone, heads = modules.task, modules.backbone, modules.heads
    fitting = 0 if heads_fit else length.projector
    computing.place(backbone)
    computing.place(heads)
    modules.train()
    optimizer = task.optimizer([*backbone.parameters(), *heads.parameters()], length.lr, settings.pretext.weight_decay)
    floor = settings.pretext.lr_floor
    scheduler = schedule(optimizer, total_steps=max(1, length.steps), warmup_steps=length.warmup, floor=floor)
    events, total = repeat.events(stage, workspace), fitting + length.steps

    def after(number: int) -> None:
        computing.join_buffers(backbone, heads)
        task.after_step(backbone, heads, number)
        if number % (settings.pretext.monitor_every * len(stack)) == 0 or number == total:
            seen = _monitor(modules, batches)
            events.write({"event": "monitor", "step": number, "epoch": number / len(stack), **seen})

    update = _update(modules, optimizer, scheduler, computing)
    parts: dict[str, Any] = {"optimizer": optimizer, "scheduler": scheduler, "stack": stack}
    if fitting:
        parts["heads first"] = update = HeadsFirst(fitting, settings.pretext, computing, task, backbone, heads, update)
    seconds = run_steps(
        lambda: update(stack.next()),
        total=total,
        parts={"backbone": backbone, "heads": heads, **parts},
        writer=events,
        attempt=attempt,
        checkpoint_every=settings.pretext.checkpoint_every * len(stack),
        console=workspace.console,
        description=f"{stage}, {repeat.variant}, seed {repeat.seed}",
        after=after,
        nonfinite_skips=settings.nonfinite_skips,
    )
    costs, weights = before + Costs(pretext_steps=total, seconds=seconds), start.weights
    initial = None if weights is None else {"file": weights.path.name, "sha256": weights.sha256}
    facts = {**costs.facts(), **repeat.facts(), "initial_weights": initial}
    return {"backbone": backbone, "heads": heads}, facts


def _modules(settings: Config, start: _Start, workspace: Workspace) -> tuple[_Modules, bool]:
    """The networks, and whether the heads fit the backbone as well as they should."""
    model, task = settings.model, settings.pretext_task()
    backbone = build_backbone(model.backbone, image_size=settings.data.image_size)
    if start.weights is not None:
        # Before the heads are made, which may hold a copy of the backbone.
        line = load_backbone(start.weights, backbone, model.backbone)
        workspace.console.print(line, markup=False, highlight=False, soft_wrap=True)
    heads = task.build(backbone)
    if start.parent is not None:
        start.parent.load_into({"backbone": backbone, "heads": heads})
    fit = start.weights is None or load_heads(start.weights, heads)
    return _Modules(task, backbone, heads), fit


def _key(repeat: Repeat, stage: str, start: _Start, length: _Length) -> str:
    settings, weights = repeat.settings, start.weights
    sources = {"pretext", "image_size", "pretext_limit", "test_fraction", "split_seed"}
    shared = [] if stage == STAGE else [settings.bissl.pretext_fraction]
    # By its content: the same file elsewhere makes the same artifact. Any arm fits heads at the warm-up's rate.
    given = [] if weights is None else [weights.sha256, length.projector, settings.pretext.lr]
    return make_key(
        stage,
        repeat.seed,
        start.parent,
        settings.data.model_dump(include=sources),
        settings.model.model_dump(include={"backbone"}),
        settings.pretext.step_settings(),
        [length.steps, length.lr, length.warmup, *shared, *given],
        settings.compute.model_dump(exclude={"data_device"}),
    )


def _update(
    modules: _Modules,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    computing: Computing,
) -> Update:
    """One step on a batch, in chunks of compute.micro_batch or at once."""
    task, backbone, heads = modules.task, modules.backbone, modules.heads
    size = computing.fields.micro_batch
    if size is None:
        loss = computing.first_order(lambda batch: pretext_loss(task, backbone, dict(heads.items()), batch))
        return lambda batch: optimizer_step(loss(batch), optimizer, scheduler)
    outputs = computing.first_order(lambda lower, chunk: task.outputs(*bind_lower(backbone, heads, lower), chunk))
    variables = lower_variables(backbone, heads)

    def update(batch: Any) -> dict[str, Any]:
        whole = partial(pretext_output_loss, task)
        value, gradient = micro_batched_gradient(outputs, whole, variables, split(batch, size))
        return gradient_step(value, gradient, variables, optimizer, scheduler)

    return update


@torch.no_grad()
def _monitor(modules: _Modules, batches: Batches) -> dict[str, float | None]:
    """k-NN accuracy of the features on the labelled sets, and the spread of the embeddings (0: collapse)."""
    modules.train(False)
    # Always the same images and the same draws, so that only the weights make a difference.
    images = batches.data.pretext.images[:512]
    batch = batches.computing.move(modules.task.transform()(images, torch.Generator().manual_seed(0)))
    embeddings = modules.task.embed(modules.backbone, dict(modules.heads.items()), batch)
    spread = None if embeddings is None else embedding_spread(embeddings)
    accuracy = _nearest_neighbours(modules.backbone, batches)
    modules.train()
    return {"knn_top1": accuracy, "embedding_spread": spread}


def _nearest_neighbours(backbone: nn.Module, batches: Batches) -> float | None:
    """None where the downstream task has no tensors of images with one class each."""
    sets = batches.data.downstream
    task = batches.settings.downstream_task(sets.train.classes)
    train, val = batches.evaluation(sets.train, task), batches.evaluation(sets.val, task)
    inputs, targets = train[0]
    tensors = isinstance(inputs, Tensor) and isinstance(targets, Tensor)
    if not tensors or targets.dim() != 1 or targets.is_floating_point():
        return None

    def features(batches: list[Any]) -> tuple[Tensor, Tensor]:
        outputs = [on_shards(backbone, inputs) for inputs, _ in batches]
        return torch.cat(outputs), torch.cat([targets for _, targets in batches])

    neighbours = min(20, max(1, len(sets.train) // len(sets.train.classes)))
    return knn_accuracy(*features(train), *features(val), neighbours=neighbours)
