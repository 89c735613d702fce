"""Stage 1: self-supervised training of the backbone and the pretext heads."""

from collections.abc import Callable, Mapping
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
from ....vision.losses import embedding_spread
from ....vision.metrics import knn_accuracy
from ....vision.networks.backbones import build_backbone
from ....vision.networks.foreign_weights import ForeignWeights, load_backbone, load_heads
from ....vision.optimizers import schedule
from ....vision.shards import on_shards
from ...settings.plan import make_plan
from ...tasks.base import PretextTask
from ..context import LOWER_DATA, Context
from ..global_loss import pretext_loss, pretext_output_loss
from ..loop import discard_checkpoints, gradient_step, optimizer_step, run_steps
from ..problem import bind_lower, lower_variables
from ..warm_start import HeadsFirst, initial_weights

STAGE, RESTART = "pretext", "restart"


@dataclass(frozen=True)
class _Length:
    """Steps, peak learning rate, steps of warm-up, and steps before them in which heads alone are fitted."""

    steps: int
    lr: float
    warmup: int
    projector: int = 0


def run(context: Context, artifact: Artifact | None = None, *, steps: int | None = None) -> Artifact:
    """Train for as long as the context's arm asks, or for `steps`; `artifact` is not used.

    Weights are random, or those of model.init_backbone; then heads that the file lacks are fitted to them first.
    """
    plan = make_plan(context.config, context.arm, len(context.data.pretext), 0)
    length = _Length(steps or plan.pretext, plan.pretext_lr, plan.warmup, plan.projector)
    return _train(context, STAGE, None, length, context.pretext_stack(context.config.pretext_task(), STAGE))


def restart(context: Context, artifact: Artifact) -> Artifact:
    """Go on from a pretext artifact with the lower level's steps, schedule and batches, without an upper level."""
    c = context.config.bissl
    stack = context.pretext_stack(context.config.pretext_task(), LOWER_DATA, c.pretext_fraction)
    steps = c.alternations * c.lower_steps
    length = _Length(steps, c.lower_lr, min(round(c.lower_warmup_epochs * len(stack)), steps - 1))
    return _train(context, RESTART, artifact, length, stack)


def _train(context: Context, stage: str, parent: Artifact | None, length: _Length, stack: BatchStack) -> Artifact:
    config = context.config
    weights = initial_weights(config.model) if parent is None else None
    key = _key(context, stage, parent, length, weights)
    finished = context.store.find(stage, key)
    if finished is not None:
        return finished
    torch.manual_seed(derive_seed(context.seed, stage))
    task = config.pretext_task()
    backbone, heads, heads_fit = _modules(context, task, weights)
    fitting = 0 if heads_fit else length.projector
    if parent is not None:
        parent.load_into({"backbone": backbone, "heads": heads})
    context.computing.place(backbone).train()
    context.computing.place(heads).train()
    parameters = [*backbone.parameters(), *heads.parameters()]
    optimizer = task.optimizer(parameters, length.lr, config.pretext.weight_decay)
    floor = config.pretext.lr_floor
    scheduler = schedule(optimizer, total_steps=max(1, length.steps), warmup_steps=length.warmup, floor=floor)
    directory, writer = context.store.directory(stage, key), context.writer(stage)

    def after(number: int) -> None:
        context.computing.join_buffers(backbone, heads)
        task.after_step(backbone, heads, number)
        if number % (config.pretext.monitor_every * len(stack)) == 0 or number == fitting + length.steps:
            seen = _look(context, task, backbone, heads)
            writer.write({"event": "monitor", "step": number, "epoch": number / len(stack), **seen})

    update = _update(context, task, backbone, heads, optimizer, scheduler)
    parts: dict[str, Any] = {"optimizer": optimizer, "scheduler": scheduler, "stack": stack}
    if fitting:
        parts["heads first"] = update = HeadsFirst(fitting, context, task, backbone, heads, update)
    seconds = run_steps(
        lambda: update(stack.next()),
        total=fitting + length.steps,
        parts={"backbone": backbone, "heads": heads, **parts},
        writer=writer,
        directory=directory,
        checkpoint_every=config.pretext.checkpoint_every * len(stack),
        console=context.console,
        description=f"{stage}, {context.arm}, seed {context.seed}",
        after=after,
        nonfinite_skips=config.nonfinite_skips,
    )
    before: Mapping[str, Any] = {"pretext_steps": 0, "seconds": 0.0} if parent is None else parent.info
    info = {
        "pretext_steps": before["pretext_steps"] + fitting + length.steps,
        "label_steps": 0,
        "seconds": before["seconds"] + seconds,
        "seed": context.seed,
        "variant": context.arm,
        "initial_weights": None if weights is None else {"file": weights.path.name, "sha256": weights.sha256},
    }
    artifact = context.store.save(stage, key, {"backbone": backbone, "heads": heads}, info)
    discard_checkpoints(directory)
    return artifact


def _modules(
    context: Context, task: PretextTask, weights: ForeignWeights | None
) -> tuple[nn.Module, nn.ModuleDict, bool]:
    """Backbone and heads, fresh or from `weights`, and whether the heads fit the backbone as well as they should."""
    model = context.config.model
    backbone = build_backbone(model.backbone, image_size=context.config.data.image_size)
    if weights is None:
        return backbone, task.build(backbone), True
    # Before the heads are made, which may hold a copy of the backbone.
    line = load_backbone(weights, backbone, model.backbone)
    context.console.print(line, markup=False, highlight=False, soft_wrap=True)
    heads = task.build(backbone)
    return backbone, heads, load_heads(weights, heads)


def _key(context: Context, stage: str, parent: Artifact | None, length: _Length, weights: ForeignWeights | None) -> str:
    config = context.config
    sources = {"pretext", "image_size", "pretext_limit", "test_fraction", "split_seed"}
    shared = [] if stage == STAGE else [config.bissl.pretext_fraction]
    # By its content: the same file elsewhere makes the same artifact. Any arm fits heads at the warm-up's rate.
    start = [] if weights is None else [weights.sha256, length.projector, config.pretext.lr]
    return make_key(
        stage,
        context.seed,
        parent,
        config.data.model_dump(include=sources),
        config.model.model_dump(include={"backbone"}),
        config.pretext.step_settings(),
        [length.steps, length.lr, length.warmup, *shared, *start],
        config.compute.model_dump(exclude={"data_device"}),
    )


def _update(
    context: Context,
    task: PretextTask,
    backbone: nn.Module,
    heads: nn.ModuleDict,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> Callable[[Any], dict[str, Any]]:
    """One step on a batch, in chunks of compute.micro_batch or at once; returns its event."""
    size = context.config.compute.micro_batch
    if size is None:
        loss = context.computing.first_order(lambda batch: pretext_loss(task, backbone, dict(heads.items()), batch))
        return lambda batch: optimizer_step(loss(batch), optimizer, scheduler)
    outputs = context.computing.first_order(
        lambda lower, chunk: task.outputs(*bind_lower(backbone, heads, lower), chunk)
    )
    variables = lower_variables(backbone, heads)

    def update(batch: Any) -> dict[str, Any]:
        whole = partial(pretext_output_loss, task)
        value, gradient = micro_batched_gradient(outputs, whole, variables, split(batch, size))
        return gradient_step(value, gradient, variables, optimizer, scheduler)

    return update


@torch.no_grad()
def _look(context: Context, task: PretextTask, backbone: nn.Module, heads: nn.ModuleDict) -> dict[str, float | None]:
    """k-NN accuracy of the features on the labelled sets, and the spread of the embeddings (0: collapse)."""
    backbone.eval()
    heads.eval()
    # Always the same images and the same draws, so that only the weights make a difference.
    images = context.data.pretext.images[:512]
    batch = context.computing.move(task.transform()(images, torch.Generator().manual_seed(0)))
    embeddings = task.embed(backbone, dict(heads.items()), batch)
    spread = None if embeddings is None else embedding_spread(embeddings)
    accuracy = _nearest_neighbours(context, backbone)
    backbone.train()
    heads.train()
    return {"knn_top1": accuracy, "embedding_spread": spread}


def _nearest_neighbours(context: Context, backbone: nn.Module) -> float | None:
    """None where the downstream task has no tensors of images with one class each."""
    sets = context.data.downstream
    task = context.config.downstream_task(sets.train.classes)
    train, val = context.evaluation_batches(sets.train, task), context.evaluation_batches(sets.val, task)
    inputs, targets = train[0]
    if (
        not (isinstance(inputs, Tensor) and isinstance(targets, Tensor))
        or targets.dim() != 1
        or targets.is_floating_point()
    ):
        return None

    def features(batches: list[Any]) -> tuple[Tensor, Tensor]:
        outputs = [on_shards(backbone, inputs) for inputs, _ in batches]
        return torch.cat(outputs), torch.cat([targets for _, targets in batches])

    neighbours = min(20, max(1, len(sets.train) // len(sets.train.classes)))
    return knn_accuracy(*features(train), *features(val), neighbours=neighbours)
