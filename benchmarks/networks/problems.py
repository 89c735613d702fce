"""Two small networks on handwritten digits, and three kinds of hyperparameters of their training.

The lower level trains a network on few images, by gradient descent with momentum on all of them; the upper level is the
cross-entropy of other images. Everything random comes from a seed, so that a training can be made again.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bilevel import Params, Problem, functional_call

CLASSES = 10


def convolutional(width: int = 8) -> nn.Module:
    """Three convolutions with BatchNorm and ReLU, and a linear layer."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [*block(1, width, 1), *block(width, 2 * width, 2), *block(2 * width, 2 * width, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, CLASSES))


def transformer() -> nn.Module:
    """timm's smallest vision transformer (LayerNorm, GELU, attention), for images of 16 x 16."""
    return timm.create_model("test_vit", pretrained=False, num_classes=CLASSES, in_chans=1, img_size=16, patch_size=8)


@dataclass(frozen=True)
class Network:
    """How a network is made and trained."""

    make: Callable[[], nn.Module]
    pixels: int
    rate: float
    steps: int
    """Of a training, after which its loss hardly falls."""


NETWORKS = {
    "CNN": Network(convolutional, pixels=8, rate=0.1, steps=200),
    "timm test_vit": Network(transformer, pixels=16, rate=0.03, steps=200),
}


class Hyperparameters(Problem):
    """Weight decay, label smoothing and sample weights of a classifier.

    The lower objective is the mean cross-entropy, labels smoothed by sigmoid(smoothing) and samples weighted by
    2 sigmoid(weights), plus half the squared norm of each group of variables by exp(log_decay). Upper variables that
    are left out are no smoothing, weights of 1, and a decay of `decay`.

    Args:
        above: the mode of the network in the upper objective, train (batch statistics) or eval (running ones).
    """

    def __init__(self, module: nn.Module, *, decay: float = 1e-3, above: str = "train") -> None:
        self.module, self.decay, self.above = module, decay, above
        self.groups = groups(module)

    def lower_outputs(self, upper: Params, lower: Params, batch: Any) -> Mapping[str, Any]:
        return {"logits": functional_call(self.module, lower, (batch["images"],)), "variables": dict(lower)}

    def lower_output_loss(self, upper: Params, outputs: Mapping[str, Any], batch: Any) -> Tensor:
        logits, labels = outputs["logits"], batch["labels"]
        smoothing = torch.sigmoid(upper["smoothing"]) if "smoothing" in upper else 0.0
        log_p = logits.log_softmax(1)
        losses = -(1.0 - smoothing) * log_p.gather(1, labels[:, None])[:, 0] - smoothing * log_p.mean(1)
        weights = 2.0 * torch.sigmoid(upper["weights"]) if "weights" in upper else torch.ones_like(losses)
        return (weights * losses).mean() + self._penalty(upper, outputs["variables"])

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return self.lower_output_loss(upper, self.lower_outputs(upper, lower, batch), batch)

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        logits = functional_call(self.module, lower, (batch["images"],), training=self.above == "train")
        return nn.functional.cross_entropy(logits, batch["labels"])

    def _penalty(self, upper: Params, lower: Params) -> Tensor:
        squares = [
            torch.stack([lower[name].square().sum() for name in names]).sum() for names in self.groups.values()
        ]
        decay = upper["log_decay"].exp() if "log_decay" in upper else torch.full_like(torch.stack(squares), self.decay)
        return 0.5 * (decay * torch.stack(squares)).sum()


def groups(module: nn.Module) -> dict[str, list[str]]:
    """Names of the weight matrices and kernels by layer; biases and normalisation have no decay."""
    return {name: [name] for name, p in module.named_parameters() if p.dim() > 1 and name.endswith("weight")}
