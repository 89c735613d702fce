"""The networks and batches on which Hessian-vector products are measured."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer, resnet18

from bilevel import Params, functional_call
from bilevel.nn import curvature_pass
from bilevel.products import ComposedObjective
from recipes.vision.losses import nt_xent
from recipes.vision.networks.backbones import projector

_CLASSES = 10


@final
@dataclass(frozen=True)
class Case:
    """One network, batch size and loss.

    Attributes:
        contrastive: NT-Xent over two views instead of cross-entropy; half of the `batch` images are second views.
        size: width and height of the images.
    """

    model: str
    build: Callable[[], nn.Module]
    batch: int
    size: int
    contrastive: bool

    @property
    def name(self) -> str:
        return f"{self.model}, {self.batch} images of {self.size}x{self.size}"

    def objective(self, dtype: torch.dtype, device: torch.device) -> tuple[ComposedObjective, Params]:
        """The loss on a fixed batch of noise, and the variables it starts from; the same numbers in every dtype."""
        torch.manual_seed(0)
        net = self.build().to(device, dtype)
        images = torch.randn(self.batch, 3, self.size, self.size).to(device, dtype)
        labels = torch.randint(_CLASSES, (self.batch,)).to(device)

        def outputs_of(images: Tensor, upper: Params, lower: Params) -> Tensor:
            with curvature_pass(0):
                return functional_call(net, lower, images)

        # One pass a view, as in SimCLR's and BiSSL's pretext step: BatchNorm sees one view at a time.
        views = images.chunk(2 if self.contrastive else 1)

        def outputs(upper: Params, lower: Params) -> Tensor:
            return torch.cat([outputs_of(view, upper, lower) for view in views])

        def chunks(count: int) -> list[Callable[[Params, Params], Tensor]]:
            return [partial(outputs_of, part) for part in images.split(count)]

        def loss(upper: Params, z: Tensor) -> Tensor:
            if not self.contrastive:
                return nn.functional.cross_entropy(z, labels)
            first, second = z.chunk(2)
            return nt_xent(first, second)

        return ComposedObjective(outputs, loss, chunks), {name: p.detach() for name, p in net.named_parameters()}


def perceptron(size: int, width: int = 256) -> nn.Module:
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(3 * size**2, width), nn.GELU()),
        *(nn.Linear(width, width), nn.GELU(), nn.Linear(width, _CLASSES)),
    )


def convolutional(width: int = 32) -> nn.Module:
    """Four convolutions with BatchNorm, and a projector."""
    widths = [3, width, 2 * width, 4 * width, 4 * width]
    layers: list[nn.Module] = []
    for stage, (before, after) in enumerate(pairwise(widths)):
        convolution = nn.Conv2d(before, after, 3, stride=1 if stage == 0 else 2, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), projector(widths[-1], (widths[-1], 64)))


def transformer(size: int) -> nn.Module:
    """Six layers, width 128, four heads, eight patches along each side of the image."""
    net = VisionTransformer(size, size // 8, 6, 4, 128, 256, num_classes=_CLASSES)
    # torchvision starts the last layer at zero, where most second derivatives vanish.
    net.heads = nn.Sequential(nn.Linear(128, _CLASSES))
    return net


def cases(*, quick: bool) -> list[Case]:
    if quick:
        return [
            Case("MLP", lambda: perceptron(16, 64), 64, 16, contrastive=False),
            Case("conv net", lambda: convolutional(8), 32, 16, contrastive=True),
        ]
    found = [Case("MLP", lambda: perceptron(32), batch, 32, contrastive=False) for batch in (64, 512)]
    found += [Case("conv net", convolutional, batch, 32, contrastive=True) for batch in (32, 128)]
    found += [Case("small ViT", lambda: transformer(32), batch, 32, contrastive=False) for batch in (16, 64)]
    found += [Case("ResNet-18", lambda: resnet18(num_classes=64), batch, 32, contrastive=True) for batch in (32, 128)]
    return [*found, Case("ResNet-18", lambda: resnet18(num_classes=64), 32, 96, contrastive=True)]
