"""Single-label image classification."""

from typing import ClassVar, final

from torch import Tensor, nn

from ...vision.imagesets import LabelKind
from ...vision.metrics import Metric, top_k
from .linear import LinearTask


@final
class Classification(LinearTask):
    """A linear layer on the pooled features under cross-entropy (paper, section 4.1); top-1 and top-5 accuracy."""

    labels: ClassVar[LabelKind] = "single-label"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self) -> dict[str, Metric]:
        metrics = {"top1": top_k(1)}
        if len(self.classes) > 5:
            metrics["top5"] = top_k(5)
        return metrics
