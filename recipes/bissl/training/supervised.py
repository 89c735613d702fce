"""What the head's warm-up and fine-tuning share: labelled steps of a backbone with a head, and its scores."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ...vision.metrics import evaluate
from ...vision.shards import on_shards
from ...vision.torch_metrics import as_metrics
from ..tasks.base import DownstreamTask
from .compute import Computing
from .global_loss import downstream_loss
from .loop import optimizer_step


class SupervisedModel:
    """A backbone and a head under a downstream task's loss.

    Args:
        backbone, head: in the modes that they train in; batches have the device of `computing`.
    """

    def __init__(self, task: DownstreamTask, backbone: nn.Module, head: nn.Module, computing: Computing) -> None:
        self.task, self.backbone, self.head, self.metrics = task, backbone, head, as_metrics(task.metrics())
        self.computing = computing
        self._loss = computing.first_order(
            lambda inputs, targets: downstream_loss(task, backbone, head, inputs, targets)
        )

    def step(
        self, batch: Any, optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler
    ) -> dict[str, Any]:
        """One update on a batch of inputs and targets, as `optimizer_step`."""
        record = optimizer_step(self._loss(*batch), optimizer, scheduler)
        self.computing.join_buffers(self.backbone, self.head)
        return record

    def measure(self, batches: Sequence[Any]) -> dict[str, float]:
        """The task's metrics and loss over `batches` in eval mode; every mode is afterwards what it was."""
        modes = [(module, module.training) for module in (self.backbone, self.head)]
        for module, _ in modes:
            module.eval()
        forward = self.task.forward
        outputs = partial(on_shards, lambda inputs: forward(self.backbone, self.head, inputs))
        values = evaluate(outputs, batches, self.metrics, self.task.loss)
        for module, training in modes:
            module.train(training)
        return values
