"""Stage 4: fine-tuning of the backbone with a fresh head; the best validation epoch is tested."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bilevel.training import derive_seed

from ....experiment.artifacts import Artifact, make_key
from ....vision.metrics import Metric
from ....vision.networks.backbones import build_backbone
from ....vision.optimizers import schedule
from ...settings.plan import finetune_steps
from ...tasks.base import DownstreamTask
from ..context import Context
from ..loop import discard_checkpoints, run_steps
from ..supervised import SupervisedModel

STAGE = "finetune"


@dataclass(frozen=True)
class Fitted:
    """A finished training, before any test.

    Attributes:
        modules: "backbone" and "head" with the weights of the best validation epoch.
        supervised: the same modules under the task.
        facts: which epoch that was, by which metric, and its validation values.
        steps, seconds: what it took.
    """

    modules: nn.ModuleDict
    supervised: SupervisedModel
    facts: dict[str, Any]
    steps: int
    seconds: float


def run(context: Context, artifact: Artifact | None = None) -> Artifact:
    """Fine-tune the artifact's "backbone" (theta_P and its buffers), or random weights where there is no artifact.

    The weights of the best validation epoch by the task's primary metric (the lower loss, then the earlier epoch,
    where epochs tie) are evaluated on the test split; only that is called test.
    """
    key = _key(context, artifact)
    finished = context.store.find(STAGE, key)
    if finished is not None:
        return finished
    directory = context.store.directory(STAGE, key)
    fitted = fit(context, artifact, directory)
    info = {
        **_costs(artifact, fitted.steps, fitted.seconds),
        "seed": context.seed,
        "variant": context.arm,
        **fitted.facts,
        "test": fitted.supervised.measure(
            context.evaluation_batches(context.data.downstream.test, fitted.supervised.task)
        ),
    }
    result = context.store.save(STAGE, key, dict(fitted.modules.items()), info)
    discard_checkpoints(directory)
    return result


def fit(
    context: Context, artifact: Artifact | None, directory: Path, *, check: Callable[[], None] | None = None
) -> Fitted:
    """Train as `run` does, up to the best validation epoch; the test split is not touched.

    Args:
        directory: where checkpoints lie; they are left there.
        check: called before each step; what it raises stops the training, which a later call continues.

    Raises:
        NonFiniteError: a training loss or gradient is not finite.
    """
    config, sets = context.config, context.data.downstream
    torch.manual_seed(derive_seed(context.seed, STAGE))
    task, model = _build(context, artifact)
    rate, decay = config.finetune.rates(context.arm)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=decay)
    stack, writer = context.labelled_stack(task, STAGE), context.writer(STAGE)
    total = finetune_steps(config, context.arm, len(sets.train))
    scheduler = schedule(optimizer, total_steps=total)
    supervised = SupervisedModel(task, model["backbone"], model["head"], context.computing)
    best, losses = _Best(model, supervised.metrics), _Losses()
    validation = context.evaluation_batches(sets.val, task)

    def step() -> dict[str, Any]:
        if check is not None:
            check()
        record = supervised.step(stack.next(), optimizer, scheduler)
        losses.values.append(record["loss"])
        return record

    def after(number: int) -> None:
        epoch, rest = divmod(number, len(stack))
        if rest or (epoch % config.finetune.validate_every and number < total):
            return
        values = supervised.measure(validation)
        best.offer(epoch, values)
        named = {f"val_{name}": value for name, value in values.items()}
        writer.write({"event": "epoch", "step": number, "epoch": epoch, "train_loss": losses.take_mean(), **named})

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
        nonfinite_skips=config.nonfinite_skips,
    )
    best.restore()
    return Fitted(model, supervised, best.facts(), total, seconds)


def _build(context: Context, artifact: Artifact | None) -> tuple[DownstreamTask, nn.ModuleDict]:
    """The task, and the backbone (the artifact's weights, if there is one) with a fresh head, ready to train."""
    task = context.config.downstream_task(context.data.downstream.train.classes)
    backbone = build_backbone(context.config.model.backbone, image_size=context.config.data.image_size)
    model = nn.ModuleDict({"backbone": backbone, "head": task.build(backbone)})
    if artifact is not None:
        artifact.load_into({"backbone": backbone})
    context.computing.place(model).train()
    return task, model


def _key(context: Context, artifact: Artifact | None) -> str:
    config = context.config
    steps = finetune_steps(config, context.arm, len(context.data.downstream.train))
    return make_key(
        STAGE,
        context.seed,
        artifact,
        config.data.model_dump(exclude={"root", "download", "pretext", "pretext_limit"}),
        config.model.model_dump(include={"backbone"}),
        config.downstream.model_dump(exclude={"eval_batch_size"}),
        [steps, config.finetune.validate_every, *config.finetune.rates(context.arm)],
        config.compute.model_dump(exclude={"data_device", "micro_batch"}),
    )


def _costs(artifact: Artifact | None, steps: int, seconds: float) -> dict[str, Any]:
    """Steps, linear solves by status and seconds of this and all earlier stages."""
    before: Mapping[str, Any] = {"pretext_steps": 0, "label_steps": 0, "seconds": 0.0}
    before = before if artifact is None else artifact.info
    return {
        "pretext_steps": before["pretext_steps"],
        "label_steps": before["label_steps"] + steps,
        "seconds": before["seconds"] + seconds,
        "solves": before.get("solves", {}),
    }


class _Losses:
    """The training losses since the last validation."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def take_mean(self) -> float:
        """Their mean, NaN where every step was left out; then start anew."""
        mean = sum(self.values) / len(self.values) if self.values else math.nan
        self.values = []
        return mean

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.values = list(state["values"])


class _Best:
    """The weights of the best validation epoch so far."""

    def __init__(self, model: nn.Module, metrics: Mapping[str, Metric]) -> None:
        self.model, self.metrics, self.primary = model, metrics, next(iter(metrics))
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

    def facts(self) -> dict[str, Any]:
        """Which epoch it was by which metric, and its values."""
        return {
            "primary_metric": self.primary,
            "higher_is_better": {name: metric.higher_is_better for name, metric in self.metrics.items()},
            "best": {"epoch": self.epoch, **self.values},
        }

    def _rank(self, values: dict[str, float]) -> tuple[float, float]:
        """A value that is not a number is worse than any that is."""
        score, loss = self.sign * values[self.primary], -values["loss"]
        return -math.inf if math.isnan(score) else score, -math.inf if math.isnan(loss) else loss

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "values": self.values, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.values = state["epoch"], dict(state["values"])
        self.weights = dict(state["weights"])
