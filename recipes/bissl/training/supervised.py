"""What the head's warm-up and fine-tuning share: a backbone with a head on labelled batches, and its scores."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...vision.metrics import evaluate
from ...vision.shards import on_shards
from ...vision.torch_metrics import as_metrics
from ..tasks.base import DownstreamTask
from .compute import Computing
from .global_loss import downstream_loss


class SupervisedModel:
    """A backbone and a head under a downstream task's loss.

    Args:
        backbone, head: in the modes that they train in; batches have the device of `computing`.
    """

    def __init__(self, task: DownstreamTask, backbone: nn.Module, head: nn.Module, computing: Computing) -> None:
        self.task, self.backbone, self.head, self.metrics = task, backbone, head, as_metrics(task.metrics())
        self._loss = computing.first_order(
            lambda inputs, targets: downstream_loss(task, backbone, head, inputs, targets)
        )

    def loss(self, batch: Any) -> Tensor:
        """The loss on a batch of inputs and targets, 0-d."""
        return self._loss(*batch)

    def measure(self, batches: Iterable[Any]) -> dict[str, float]:
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
