"""Stage 1: self-supervised training of the backbone and the pretext heads."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.batches import derive_seed
from bilevel.microbatch import micro_batched_gradient
from bilevel.problem import split
from recipes.bissl.artifact import Artifact, make_key
from recipes.bissl.context import Context
from recipes.bissl.evaluate import knn_accuracy
from recipes.bissl.loop import discard_checkpoints, gradient_step, optimizer_step, run_steps
from recipes.bissl.losses import embedding_spread
from recipes.bissl.models import build_backbone
from recipes.bissl.optim import schedule
from recipes.bissl.plan import make_plan
from recipes.bissl.problem import bind_lower, lower_variables
from recipes.bissl.tasks.base import PretextTask

STAGE = "pretext"


def run(context: Context, artifact: Artifact | None = None) -> Artifact:
    """Train from random weights for as long as the context's arm asks; `artifact` is not used."""
    config, images = context.config, context.data.pretext
    plan = make_plan(config, context.arm, len(images), 0)
    key = make_key(
        STAGE,
        context.seed,
        None,
        config.data.model_dump(include={"pretext", "image_size", "pretext_limit", "test_fraction", "split_seed"}),
        config.model.model_dump(),
        config.pretext.model_dump(include={"task", "options", "batch_size", "weight_decay"}),
        [plan.pretext, plan.pretext_lr, plan.warmup],
        config.compute.model_dump(exclude={"data_device"}),
    )
    finished = context.store.find(STAGE, key)
    if finished is not None:
        return finished
    torch.manual_seed(derive_seed(context.seed, STAGE))
    task = config.pretext_task()
    backbone = build_backbone(config.model.backbone)
    heads = task.build(backbone)
    context.computing.place(backbone)
    context.computing.place(heads)
    parameters = [*backbone.parameters(), *heads.parameters()]
    optimizer = task.optimizer(parameters, plan.pretext_lr, config.pretext.weight_decay)
    scheduler = schedule(optimizer, total_steps=plan.pretext, warmup_steps=plan.warmup)
    stack = context.pretext_stack(task, STAGE)
    directory, writer = context.store.directory(STAGE, key), context.writer(STAGE)
    backbone.train()
    heads.train()

    def after(number: int) -> None:
        task.after_step(backbone, heads, number)
        if number % (config.pretext.monitor_every * len(stack)) == 0 or number == plan.pretext:
            seen = _look(context, task, backbone, heads)
            writer.write({"event": "monitor", "step": number, "epoch": number / len(stack), **seen})

    update = _update(context, task, backbone, heads, optimizer, scheduler)
    seconds = run_steps(
        lambda: update(stack.next()),
        total=plan.pretext,
        parts={"backbone": backbone, "heads": heads, "optimizer": optimizer, "scheduler": scheduler, "stack": stack},
        writer=writer,
        directory=directory,
        checkpoint_every=config.pretext.checkpoint_every * len(stack),
        console=context.console,
        description=f"pretext, {context.arm}, seed {context.seed}",
        after=after,
    )
    info = {"pretext_steps": plan.pretext, "label_steps": 0, "seconds": seconds, "seed": context.seed}
    artifact = context.store.save(STAGE, key, {"backbone": backbone, "heads": heads}, info)
    discard_checkpoints(directory)
    return artifact


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
        loss = context.computing.first_order(lambda batch: task.loss(backbone, dict(heads.items()), batch))
        return lambda batch: optimizer_step(loss(batch), optimizer, scheduler)
    outputs = context.computing.first_order(
        lambda lower, chunk: task.outputs(*bind_lower(backbone, heads, lower), chunk)
    )
    variables = lower_variables(backbone, heads)

    def update(batch: Any) -> dict[str, Any]:
        value, gradient = micro_batched_gradient(outputs, task.output_loss, variables, split(batch, size))
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
        return torch.cat([backbone(inputs) for inputs, _ in batches]), torch.cat([targets for _, targets in batches])

    neighbours = min(20, max(1, len(sets.train) // len(sets.train.classes)))
    return knn_accuracy(*features(train), *features(val), neighbours=neighbours)
