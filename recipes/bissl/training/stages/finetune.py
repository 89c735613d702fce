"""Stage 4: fine-tuning of the backbone with a fresh head; the best validation epoch is tested."""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from bilevel import Level
from bilevel.training import Callback, NonFiniteError, SingleLevelTrainer, derive_seed, gradient_of

from ....experiment.artifacts import Artifact, make_key
from ....experiment.events import StageEvents
from ....experiment.stage import Attempt, CachedStage
from ....experiment.stage_training import run_training
from ....experiment.workspace import Workspace
from ....vision.metrics import Metric
from ....vision.networks.backbones import build_backbone
from ....vision.optimizers import schedule
from ...settings.plan import finetune_steps
from ...settings.sections import HOW_READ
from ...tasks.base import DownstreamTask
from ..compute import Computing, JoinBuffers
from ..costs import Costs, costs_of
from ..datasets import Datasets, resolution
from ..image_batches import Batches
from ..problem import trainable
from ..repeat import Repeat
from ..supervised import SupervisedModel

STAGE = "finetune"


@dataclass(frozen=True)
class Fitted:
    """A finished training, before any test.

    Attributes:
        modules: "backbone" and "head" with the weights of the best validation epoch.
        supervised: the same modules under the task.
        facts: which epoch that was, by which metric, and its validation values.
        costs: what it took.
    """

    modules: nn.ModuleDict
    supervised: SupervisedModel
    facts: dict[str, Any]
    costs: Costs


def run(
    repeat: Repeat, data: Datasets, computing: Computing, workspace: Workspace, parent: Artifact | None = None
) -> Artifact:
    """Fine-tune the parent's "backbone" (theta_P and its buffers), or random weights where there is no parent.

    The weights of the best validation epoch by the task's primary metric (where epochs tie, the one that finetune.ties
    names) are evaluated on the test split; only that is called test. An epoch whose loss there is finite is better than
    any other.
    """
    before = costs_of(parent)

    def made(attempt: Attempt) -> tuple[dict[str, nn.Module], dict[str, Any]]:
        fitted = fit(repeat, data, computing, workspace, parent, attempt)
        test = Batches(repeat, data, computing).evaluation(data.downstream.test, fitted.supervised.task)
        costs = before + fitted.costs
        # Linear solves by status: those of a bilevel stage before.
        solves = {} if parent is None else parent.info.get("solves", {})
        images = data.facts(parent, pretext=False, labelled=True)
        facts = {**costs.facts(), "solves": solves, **repeat.facts(), **images, **fitted.facts}
        return dict(fitted.modules.items()), {**facts, "test": fitted.supervised.measure(test)}

    key = _key(repeat, data, parent)
    return CachedStage(workspace.store, STAGE, key).run(made)


def fit(
    repeat: Repeat,
    data: Datasets,
    computing: Computing,
    workspace: Workspace,
    parent: Artifact | None,
    attempt: Attempt,
) -> Fitted:
    """Train as `run` does, up to the best validation epoch; the test split is not touched, and only checkpoints stay.

    Raises:
        NonFiniteError: a training loss or gradient is not finite, or no validation loss is.
    """
    settings, sets, batches = repeat.settings, data.downstream, Batches(repeat, data, computing)
    torch.manual_seed(derive_seed(repeat.seed, STAGE))
    task = settings.downstream_task(sets.train.classes)
    model = _model(repeat, task, parent)
    computing.place(model).train()
    variables, (rate, decay) = trainable(model), settings.finetune.rates(repeat.variant)
    optimizer = torch.optim.SGD(list(variables.values()), lr=rate, momentum=0.9, weight_decay=decay)
    total = finetune_steps(settings, repeat.variant, len(sets.train))
    stack, events = batches.labelled(task, STAGE, total), repeat.events(STAGE, workspace)
    scheduler = schedule(optimizer, total_steps=total, floor=settings.finetune.lr_floor)
    supervised = SupervisedModel(task, model["backbone"], model["head"], computing)
    best = _Best(model, supervised.metrics, settings.finetune.ties)
    validation = _Validation(
        supervised,
        batches.evaluation(sets.val, task),
        best,
        len(stack),
        settings.finetune.validate_every,
        events,
        attempt,
    )
    trainer, seconds = run_training(
        lambda callbacks: SingleLevelTrainer(
            gradient_of(supervised.loss, variables),
            Level(variables, optimizer, stack, scheduler=scheduler),
            total,
            parts={"model": model},
            callbacks=callbacks,
            nonfinite_skips=settings.nonfinite_skips,
        ),
        f"fine-tuning, {repeat.variant}, seed {repeat.seed}",
        events=events,
        attempt=attempt,
        workspace=workspace,
        checkpoint_every=settings.finetune.checkpoint_every * len(stack),
        callbacks=(JoinBuffers(computing, model), validation),
    )
    if not math.isfinite(best.values["loss"]):
        raise NonFiniteError(
            f"{STAGE}: the loss on the validation set was not finite after any of {best.offers} evaluations, so that "
            "none gives weights to test. Lower the learning rate, or check the data and the weights that it began with"
        )
    best.restore()
    costs = Costs(label_steps=total, seconds=seconds, skipped_label_steps=trainer.skipped.total())
    return Fitted(model, supervised, best.facts(), costs)


def _model(repeat: Repeat, task: DownstreamTask, parent: Artifact | None) -> nn.ModuleDict:
    """The backbone (the parent's weights, if there is one) with a fresh head."""
    model, size = repeat.settings.model, repeat.settings.data.image_size
    backbone = build_backbone(model.backbone, image_size=size, zero_init_residual=model.zero_init_residual)
    modules = nn.ModuleDict({"backbone": backbone, "head": task.build(backbone)})
    if parent is not None:
        parent.load_into({"backbone": backbone})
    return modules


def _key(repeat: Repeat, data: Datasets, parent: Artifact | None) -> str:
    settings = repeat.settings
    steps = finetune_steps(settings, repeat.variant, len(data.downstream.train))
    return make_key(
        STAGE,
        repeat.seed,
        parent,
        settings.data.model_dump(exclude=HOW_READ | {"pretext", "pretext_limit"})
        | resolution(data.downstream.train, data.downstream.val, data.downstream.test),
        data.identity.labelled,
        settings.model.model_dump(include={"backbone", "zero_init_residual"}),
        settings.downstream.model_dump(exclude={"eval_batch_size"}),
        [steps, *settings.finetune.rates(repeat.variant)],
        settings.finetune.model_dump(include={"validate_every", "ties", "lr_floor"}),
        settings.compute.decisive("micro_batch"),
    )


class _Validation(Callback):
    """Scores the model every so many epochs and after the last one, and keeps the best weights."""

    def __init__(
        self,
        model: SupervisedModel,
        batches: Iterable[Any],
        best: "_Best",
        epoch: int,
        every: int,
        events: StageEvents,
        attempt: Attempt,
    ) -> None:
        self.model, self.batches, self.best, self.events, self.attempt = model, batches, best, events, attempt
        self.epoch, self.every = epoch, every
        self.losses: list[float] = []

    def on_event(self, trainer: Any, record: dict[str, Any]) -> None:
        if "skipped" not in record:
            self.losses.append(record["loss"])

    def on_progress(self, trainer: Any) -> None:
        step = trainer.progress
        epoch, rest = divmod(step, self.epoch)
        if rest or (epoch % self.every and step < trainer.total):
            return
        values = self.model.measure(self.batches)
        self.best.offer(epoch, values)
        # NaN where every step since the last time was left out.
        mean = sum(self.losses) / len(self.losses) if self.losses else math.nan
        named = {f"val_{name}": value for name, value in values.items()}
        self.events.write({"event": "epoch", "step": step, "epoch": epoch, "train_loss": mean, **named})
        self.losses = []
        self.attempt.report(epoch, values[self.best.primary])

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "best": self.best.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses = list(state["losses"])
        self.best.load_state_dict(state["best"])


class _Best:
    """The weights of the best validation epoch so far."""

    def __init__(self, model: nn.Module, metrics: Mapping[str, Metric], ties: Literal["first", "lower-loss"]) -> None:
        self.model, self.metrics, self.ties, self.primary = model, metrics, ties, next(iter(metrics))
        self.sign = 1.0 if metrics[self.primary].higher_is_better else -1.0
        self.epoch, self.offers = 0, 0
        self.values: dict[str, float] = {}
        self.weights: dict[str, Any] = {}

    def offer(self, epoch: int, values: dict[str, float]) -> None:
        """Keep the model as it is now if `values` beat the best so far."""
        self.offers += 1
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

    def _rank(self, values: dict[str, float]) -> list[float]:
        """A value that is not a number is worse than any that is, and so is a network whose loss is not finite."""
        ranked = [self.sign * values[self.primary]] + ([-values["loss"]] if self.ties == "lower-loss" else [])
        sound = float(math.isfinite(values["loss"]))
        return [sound, *(-math.inf if math.isnan(value) else value for value in ranked)]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "offers": self.offers, "values": self.values, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.offers, self.values = state["epoch"], state["offers"], dict(state["values"])
        self.weights = dict(state["weights"])
