"""Multi-label image classification: any number of classes an image."""

from typing import ClassVar, Literal, final

from pydantic import Field
from torch import Tensor, nn

from ...vision.imagesets import LabelKind
from ...vision.metrics import Metric, map11
from .linear import LinearTask


@final
class MultiLabel(LinearTask):
    """A linear layer on the pooled features; targets are multi-hot [N, classes]; 11-point mean average precision.

    With scores o and targets y of one image, averaged over images::

        bce:      1/C sum_c [ log(1 + exp(o_c)) - y_c o_c ]
        softmax:  - sum_c y_c log( exp(o_c) / sum_k exp(o_k) )

    The softmax, not divided by the number of an image's classes, is what the paper's published code uses on VOC2007;
    it says nothing of an image without any class, where bce learns that none is there.
    """

    labels: ClassVar[LabelKind] = "multi-label"

    loss_function: Literal["bce", "softmax"] = Field(
        default="bce", description="binary cross-entropy of each class, or softmax cross-entropy against all of them"
    )

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        present = targets.to(outputs.dtype)
        if self.loss_function == "bce":
            return nn.functional.binary_cross_entropy_with_logits(outputs, present)
        return nn.functional.cross_entropy(outputs, present)

    def metrics(self) -> dict[str, Metric]:
        return {"map11": map11()}

    def describe(self) -> list[str]:
        names = {"bce": "binary cross-entropy, mean over classes", "softmax": "softmax cross-entropy, multi-hot target"}
        return [f"downstream loss: {names[self.loss_function]}"]
