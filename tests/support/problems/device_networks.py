"""Small networks of the kinds that devices have kernels of their own for, in a problem with weights of samples."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bilevel import Params, Problem, functional_call, ridge
from bilevel.nn import training_autocast
from tests.support.problems.small_modules import parameters

SIZE, CLASSES, SAMPLES = 8, 5, 24


class Recurrent(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.LSTM(3 * SIZE, 8, batch_first=True), nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.layer(images.transpose(1, 2).flatten(2))[0][:, -1])


class Attention(nn.Module):
    """A transformer's layer over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(3 * SIZE, 4, 32, dropout=0.0, activation="gelu", batch_first=True)
        self.out = nn.Linear(3 * SIZE, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.layer(images.transpose(1, 2).flatten(2)).mean(1))


def convolutional(norm: Callable[[int], nn.Module], activation: type[nn.Module] = nn.SiLU) -> nn.Module:
    first, second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)]
    return nn.Sequential(first, norm(8), activation(), second, norm(8), activation(), *head)


def normed(module: nn.Module) -> nn.Module:
    """Weight norm on every convolution."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.utils.parametrizations.weight_norm(layer)
    return module


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: convolutional(nn.BatchNorm2d),
    "batch norm, ReLU": lambda: convolutional(nn.BatchNorm2d, nn.ReLU),
    "weight norm": lambda: normed(convolutional(lambda n: nn.GroupNorm(2, n))),
    "LSTM": Recurrent,
    "attention": Attention,
}


class Weighted(Problem):
    """Weights of samples above; below a ridge that makes the system positive definite.

    Attributes:
        cast: whether objectives ask for bfloat16 in training steps.
        seen: precisions of the outputs that the objectives have met.
    """

    regularization_weight = 5.0

    def __init__(self, module: nn.Module, *, cast: bool = False) -> None:
        self.module, self.cast, self.seen = module, cast, set[torch.dtype]()

    def losses(self, lower: Params, images: Tensor, labels: Tensor) -> Tensor:
        if self.cast:
            with training_autocast(images.device.type):
                outputs = functional_call(self.module, lower, images)
        else:
            outputs = functional_call(self.module, lower, images)
        self.seen.add(outputs.dtype)
        return nn.functional.cross_entropy(outputs.to(images.dtype), labels, reduction="none")

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        images, labels, rows = batch
        return (upper["weights"][rows].sigmoid() * self.losses(lower, images, labels)).mean()

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return self.losses(lower, *batch[:2]).mean()

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return ridge(lower)


class Moved(Weighted):
    """The same with batches from the host."""

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        device = upper["weights"].device
        return super().lower_objective(upper, lower, [tensor.to(device, non_blocking=True) for tensor in batch])


def made(
    name: str,
    device: torch.device,
    dtype: torch.dtype = torch.float64,
    kind: type[Weighted] = Weighted,
    layout: torch.memory_format = torch.contiguous_format,
) -> tuple[Weighted, Params, Params, Any]:
    """A problem of a network with its variables and a batch: the same numbers everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = NETWORKS[name]().double()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(SAMPLES, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    weights = torch.randn(SAMPLES, generator=generator, dtype=torch.float64)
    module.to(device, dtype).to(memory_format=layout)  # type: ignore[call-overload]
    batch = (
        images.to(device, dtype, memory_format=layout),
        labels.to(device),
        torch.arange(SAMPLES, device=device),
    )
    return kind(module), {"weights": weights.to(device, dtype)}, parameters(module), batch
