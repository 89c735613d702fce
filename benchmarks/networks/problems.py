"""Two small networks on handwritten digits, and three kinds of hyperparameters of their training.

The lower level trains a network by Adam on few images, all of them in every step, a fifth of the labels wrong; the
upper level is the cross-entropy of other images. Everything random comes from a seed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bilevel import Params, Problem, Unrolled, functional_call, hypergradient
from bilevel.hypergradients import AdamUpdate, Update

CLASSES = 10
KINDS = {"log_decay": "weight decay", "smoothing": "smoothing", "weights": "sample weights"}
STEP = {"log_decay": 0.3, "smoothing": 0.3, "weights": 1.0}
"""Of a difference along a direction of length 1."""

Batch = Mapping[str, Tensor]


def convolutional(width: int = 8) -> nn.Module:
    """Three convolutions with BatchNorm and ReLU, and a linear layer."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [*block(1, width, 1), *block(width, 2 * width, 2), *block(2 * width, 2 * width, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, CLASSES))


def transformer() -> nn.Module:
    """timm's smallest vision transformer (LayerNorm, GELU, attention), for images of 16 x 16 pixels."""
    return timm.create_model("test_vit", pretrained=False, num_classes=CLASSES, in_chans=1, img_size=16, patch_size=8)


@dataclass(frozen=True)
class Network:
    """How a network is made, and the learning rate of its training."""

    make: Callable[[], nn.Module]
    enlarged: int
    rate: float


NETWORKS = {"CNN": Network(convolutional, 1, 1e-2), "ViT of timm": Network(transformer, 2, 1e-3)}


@dataclass(frozen=True)
class Size:
    """Images that are trained on (twice as many judge), lower steps, those of the reference, iterations of a solve."""

    images: int = 150
    steps: int = 100
    further: int = 40
    iterations: int = 100


SIZES = {"CNN": Size(), "ViT of timm": Size(images=100, further=30, iterations=50)}
QUICK = Size(images=30, steps=8, further=3, iterations=6)


class Hyperparameters(Problem):
    """Weight decay, label smoothing and sample weights of a classifier.

    The lower objective is the mean cross-entropy, labels smoothed by sigmoid(smoothing) and samples weighted by
    2 sigmoid(weights), plus half the squared norm of every weight matrix or kernel by its exp(log_decay).

    Args:
        above: the mode of the network in the upper objective, train (batch statistics) or eval (running ones).
    """

    def __init__(self, module: nn.Module, *, above: str = "train") -> None:
        self.module, self.above = module, above
        self.decayed = [name for name, p in module.named_parameters() if p.dim() > 1 and name.endswith("weight")]

    def lower_outputs(self, upper: Params, lower: Params, batch: Batch) -> Mapping[str, Any]:
        logits = functional_call(self.module, lower, (batch["images"],))
        return {"logits": logits, "decayed": [lower[name] for name in self.decayed]}

    def lower_output_loss(self, upper: Params, outputs: Mapping[str, Any], batch: Batch) -> Tensor:
        log_p, smoothing = outputs["logits"].log_softmax(1), torch.sigmoid(upper["smoothing"])
        right = log_p.gather(1, batch["labels"][:, None])[:, 0]
        losses = -(1.0 - smoothing) * right - smoothing * log_p.mean(1)
        squares = torch.stack([leaf.square().sum() for leaf in outputs["decayed"]])
        decay = 0.5 * (upper["log_decay"].exp() * squares).sum()
        return (2.0 * torch.sigmoid(upper["weights"]) * losses).mean() + decay

    def lower_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        return self.lower_output_loss(upper, self.lower_outputs(upper, lower, batch), batch)

    def upper_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        logits = functional_call(self.module, lower, (batch["images"],), training=self.above == "train")
        return nn.functional.cross_entropy(logits, batch["labels"])


@dataclass(frozen=True)
class Point:
    """Where a training stands: lower variables, what the optimizer does next, and the module's buffers."""

    lower: Params
    update: Update
    state: dict[str, Params]
    buffers: Params


class Setting:
    """A network with its data and upper variables, from one seed."""

    def __init__(self, network: Network, seed: int, size: Size) -> None:
        pixels, classes = load_digits(return_X_y=True)
        generator, n = torch.Generator().manual_seed(seed), size.images
        order = torch.randperm(len(pixels), generator=generator)
        images = (torch.from_numpy(pixels).reshape(-1, 1, 8, 8) / 16.0 - 0.5)[order].to(torch.get_default_dtype())
        images = images.repeat_interleave(network.enlarged, 2).repeat_interleave(network.enlarged, 3)
        labels = torch.from_numpy(classes)[order]
        self.wrong = torch.arange(n) < n // 5
        others = (labels[:n] + torch.randint(1, CLASSES, (n,), generator=generator)) % CLASSES
        given = torch.where(self.wrong, others, labels[:n])
        self.train: Batch = {"images": images[:n], "labels": given}
        self.validation: Batch = {"images": images[n : 3 * n], "labels": labels[n : 3 * n]}
        self.test: Batch = {"images": images[3 * n :], "labels": labels[3 * n :]}
        self.network, self.size, self.seed = network, size, seed
        torch.manual_seed(seed)
        self.module = network.make()
        self.problem, self.initial_buffers = Hyperparameters(self.module), self._buffers()
        decay, weights = torch.full((len(self.problem.decayed),), -7.0), torch.zeros(n)
        self.upper: Params = {"log_decay": decay, "smoothing": torch.tensor(-3.0), "weights": weights}

    def start(self) -> Point:
        lower = {name: p.detach().clone() for name, p in self.module.named_parameters()}
        update = AdamUpdate(self.network.rate)
        return Point(lower, update, update.init(lower), self.initial_buffers)

    def trained(self, steps: int, point: Point | None = None, upper: Params | None = None) -> Point:
        """After so many lower steps; the module's buffers are then those of this point."""
        point = self.start() if point is None else point
        self.restore(point)
        upper, lower, state = self.upper if upper is None else upper, point.lower, point.state
        for _ in range(steps):
            y = {name: leaf.detach().requires_grad_() for name, leaf in lower.items()}
            loss = self.problem.lower_objective(upper, y, self.train)
            gradients = dict(zip(y, torch.autograd.grad(loss, list(y.values())), strict=True))
            with torch.no_grad():
                lower, state = point.update.step({name: leaf.detach() for name, leaf in y.items()}, gradients, state)
        return Point(lower, point.update, state, self._buffers())

    def restore(self, point: Point) -> None:
        """Give the module the buffers of a point."""
        for name, buffer in self.module.named_buffers():
            buffer.copy_(point.buffers[name])

    def response(self, point: Point, steps: int) -> Params:
        """The derivative of F after further lower steps, by reverse mode through them."""
        self.restore(point)
        method = Unrolled(point.update, point.state, recompute=True)
        batches = {"upper_batch": self.validation, "lower_batches": [self.train] * steps}
        return hypergradient(self.problem, self.upper, point.lower, method, **batches).grad

    def difference(self, point: Point, kind: str, direction: Tensor, steps: int, *, above: str = "train") -> float:
        """Central difference of F after the same further steps, running statistics moving, along a unit direction."""
        problem, values = Hyperparameters(self.module, above=above), []
        for sign in (1.0, -1.0):
            upper = {**self.upper, kind: self.upper[kind] + sign * STEP[kind] * direction}
            ahead = self.trained(steps, point, upper)
            with torch.no_grad():
                values.append(float(problem.upper_objective(upper, ahead.lower, self.validation)))
        self.restore(point)
        return (values[0] - values[1]) / (2.0 * STEP[kind])

    def found(self, gradient: Tensor) -> float:
        """Area under the curve: how well a gradient for the sample weights tells wrong labels (to be lowered)."""
        wrong, right = gradient[self.wrong][:, None], gradient[~self.wrong][None]
        return float(((wrong > right).float() + 0.5 * (wrong == right).float()).mean())

    def _buffers(self) -> Params:
        return {name: buffer.clone() for name, buffer in self.module.named_buffers()}
