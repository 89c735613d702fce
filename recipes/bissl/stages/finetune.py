"""Stage 4: fine-tuning of the backbone with a fresh head; the best validation epoch is tested."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from bilevel.batches import derive_seed
from recipes.bissl.artifact import Artifact, make_key
from recipes.bissl.context import Context
from recipes.bissl.evaluate import Metric, evaluate
from recipes.bissl.loop import discard_checkpoints, optimizer_step, run_steps
from recipes.bissl.models import build_backbone
from recipes.bissl.optim import schedule

STAGE = "finetune"


def run(context: Context, artifact: Artifact | None = None) -> Artifact:
    """Fine-tune the artifact's "backbone" (theta_P and its buffers), or random weights where there is no artifact.

    The weights of the best validation epoch by the task's primary metric (the lower loss, then the earlier epoch,
    where epochs tie) are evaluated on the test split; only that is called test.
    """
    config, sets = context.config, context.data.downstream
    key = _key(context, artifact)
    finished = context.store.find(STAGE, key)
    if finished is not None:
        return finished
    torch.manual_seed(derive_seed(context.seed, STAGE))
    task = config.downstream_task(sets.train.classes)
    backbone = build_backbone(config.model.backbone)
    head = task.build(backbone)
    if artifact is not None:
        artifact.load_into({"backbone": backbone})
    model = nn.ModuleDict({"backbone": backbone, "head": head}).to(context.device)
    model.train()
    rate, decay = config.finetune.rates(context.arm)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=decay)
    stack, writer = context.labelled_stack(task, STAGE), context.writer(STAGE)
    total = config.finetune.epochs * len(stack)
    scheduler = schedule(optimizer, total_steps=total)
    metrics = task.metrics()
    best, losses = _Best(model, metrics), _Losses()
    validation = context.evaluation_batches(sets.val, task)

    def step() -> dict[str, Any]:
        inputs, targets = stack.next()
        record = optimizer_step(task.loss(task.forward(backbone, head, inputs), targets), optimizer, scheduler)
        losses.values.append(record["loss"])
        return record

    def measure(batches: list[Any]) -> dict[str, float]:
        model.eval()
        values = evaluate(lambda x: task.forward(backbone, head, x), batches, metrics, task.loss)
        model.train()
        return values

    def after(number: int) -> None:
        epoch, rest = divmod(number, len(stack))
        if rest or (epoch % config.finetune.validate_every and number < total):
            return
        values = measure(validation)
        best.offer(epoch, values)
        named = {f"val_{name}": value for name, value in values.items()}
        writer.write({"event": "epoch", "step": number, "epoch": epoch, "train_loss": losses.take_mean(), **named})

    directory = context.store.directory(STAGE, key)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "stack": stack}
    seconds = run_steps(
        step,
        total=total,
        parts={**parts, "best": best, "losses": losses},
        writer=writer,
        directory=directory,
        checkpoint_every=config.finetune.checkpoint_every * len(stack),
        console=context.console,
        description=f"fine-tuning, {context.arm}, seed {context.seed}",
        after=after,
    )
    best.restore()
    info = {
        **_costs(artifact, total, seconds),
        "seed": context.seed,
        "arm": context.arm,
        "primary_metric": best.primary,
        "higher_is_better": {name: metric.higher_is_better for name, metric in metrics.items()},
        "best": {"epoch": best.epoch, **best.values},
        "test": measure(context.evaluation_batches(sets.test, task)),
    }
    result = context.store.save(STAGE, key, {"backbone": backbone, "head": head}, info)
    discard_checkpoints(directory)
    return result


def _key(context: Context, artifact: Artifact | None) -> str:
    config = context.config
    return make_key(
        STAGE,
        context.seed,
        artifact,
        config.data.model_dump(exclude={"root", "download", "pretext", "pretext_limit"}),
        config.model.model_dump(),
        config.downstream.model_dump(exclude={"eval_batch_size"}),
        [config.finetune.epochs, config.finetune.validate_every, *config.finetune.rates(context.arm)],
    )


def _costs(artifact: Artifact | None, steps: int, seconds: float) -> dict[str, Any]:
    """Steps and seconds of this and all earlier stages."""
    before: Mapping[str, Any] = {"pretext_steps": 0, "label_steps": 0, "seconds": 0.0}
    before = before if artifact is None else artifact.info
    return {
        "pretext_steps": before["pretext_steps"],
        "label_steps": before["label_steps"] + steps,
        "seconds": before["seconds"] + seconds,
    }


class _Losses:
    """The training losses since the last validation."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def take_mean(self) -> float:
        """Their mean; then start anew."""
        mean = sum(self.values) / len(self.values)
        self.values = []
        return mean

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.values = list(state["values"])


class _Best:
    """The weights of the best validation epoch so far."""

    def __init__(self, model: nn.Module, metrics: Mapping[str, Metric]) -> None:
        self.model, self.primary = model, next(iter(metrics))
        self.sign = 1.0 if metrics[self.primary].higher_is_better else -1.0
        self.epoch = 0
        self.values: dict[str, float] = {}
        self.weights: dict[str, Any] = {}

    def offer(self, epoch: int, values: dict[str, float]) -> None:
        """Keep the model as it is now if `values` beat the best so far."""
        if not self.values or self._rank(values) > self._rank(self.values):
            self.epoch, self.values = epoch, dict(values)
            self.weights = copy.deepcopy(self.model.state_dict())

    def restore(self) -> None:
        """Put the best weights back into the model."""
        self.model.load_state_dict(self.weights)

    def _rank(self, values: dict[str, float]) -> tuple[float, float]:
        """A value that is not a number is worse than any that is."""
        score, loss = self.sign * values[self.primary], -values["loss"]
        return -math.inf if math.isnan(score) else score, -math.inf if math.isnan(loss) else loss

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "values": self.values, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.values = state["epoch"], dict(state["values"])
        self.weights = dict(state["weights"])
