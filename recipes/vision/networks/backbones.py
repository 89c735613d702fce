"""Backbones, the projector of the pretext stage and the linear head of the downstream tasks.

A backbone is a module with ``num_features`` whose ``forward(x, feature_map=False)`` gives pooled features
``[N, num_features]`` or, on request, the feature map ``[N, num_features, h, w]`` they are made from: its mean, unless
the class says otherwise. Weights are drawn from torch's global generator, so the caller's seed decides them.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import cast

from torch import Tensor, nn

from ...experiment.plugins import PluginError, resolve
from .timm_backbones import TIMM, TimmBackbone, check_timm
from .torchvision_backbones import (
    ChainBackbone,
    TransformerBackbone,
    check_torchvision,
    models,
    resnets,
    takes_one_size,
    torchvision_backbone,
)


class ResNetBackbone(nn.Module):
    """A residual network of torchvision without its classifier, parameter names included.

    Its weights load into the torchvision model with ``strict=False`` (only ``fc`` is missing), and the other way round.

    Args:
        name: A ResNet of torchvision: "resnet18", "resnet50", "wide_resnet50_2" and so on.
        small_images: Replaces the stem (7x7 convolution with stride 2, then max-pooling) by a 3x3 convolution with
            stride 1 and no pooling, for images of about 32x32.

    Raises:
        ValueError: torchvision has no ResNet of that name.
    """

    def __init__(self, name: str = "resnet18", *, small_images: bool = False):
        super().__init__()
        if name not in (known := resnets()):
            raise ValueError(f"name must be a ResNet of torchvision, got {name!r}; choose one of {', '.join(known)}")
        network = models().get_model(name, weights=None)
        self.num_features = network.fc.in_features
        self.conv1 = network.conv1
        self.bn1 = network.bn1
        self.relu = network.relu
        self.maxpool: nn.Module = network.maxpool
        self.layer1 = network.layer1
        self.layer2 = network.layer2
        self.layer3 = network.layer3
        self.layer4 = network.layer4
        if small_images:
            self.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.maxpool = nn.Identity()

    def forward(self, x: Tensor, feature_map: bool = False) -> Tensor:
        """Features of images ``[N, 3, H, W]``."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x if feature_map else x.mean(dim=(2, 3))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norms beside a shortcut: torchvision's BasicBlock, which a test compares.

    An own one, as torchvision takes nearly as long to import as torch, and small networks need nothing else of it.

    Args:
        before, width: Channels of the input and of the output.
        stride: Of the first convolution.
        downsample: The shortcut, where it is not the identity.

    Source: He et al., "Deep Residual Learning for Image Recognition" (2016), section 3.2.
    """

    def __init__(self, before: int, width: int, stride: int = 1, downsample: nn.Module | None = None):
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Of images ``[N, before, H, W]``: ``[N, width, H / stride, W / stride]``."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        # Last, as in torchvision: the order decides in which one second derivatives are summed.
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class SmallResNet(nn.Module):
    """A residual network for images of 8x8 to 64x64: a 3x3 stem with stride 1, no pooling, one stage per width.

    Every stage after the first halves the resolution, so three widths turn 32x32 images into 8x8 maps.

    Args:
        widths: Channels of each stage; the last one is `num_features`.
        blocks: Basic residual blocks in each stage.

    Raises:
        ValueError: `widths` is empty or a number is below 1.
    """

    def __init__(self, widths: Sequence[int] = (16, 32, 64), *, blocks: int = 1):
        super().__init__()
        if not widths or min(widths) < 1 or blocks < 1:
            raise ValueError(f"widths must be positive numbers and blocks at least 1, got {tuple(widths)} and {blocks}")
        self.num_features = widths[-1]
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        previous = (widths[0], *widths[:-1])
        self.stages = nn.Sequential(
            *(
                _stage(before, width, blocks, stride=1 if index == 0 else 2)
                for index, (before, width) in enumerate(zip(previous, widths, strict=True))
            )
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, feature_map: bool = False) -> Tensor:
        """Features of images ``[N, 3, H, W]``."""
        x = self.stages(self.relu(self.bn1(self.conv1(x))))
        return x if feature_map else x.mean(dim=(2, 3))


def _stage(before: int, width: int, blocks: int, *, stride: int) -> nn.Sequential:
    """Basic blocks, the first of which changes resolution and width."""
    shortcut = None
    if stride != 1 or before != width:
        shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))
    first = ResidualBlock(before, width, stride, shortcut)
    return nn.Sequential(first, *(ResidualBlock(width, width) for _ in range(blocks - 1)))


BACKBONES: dict[str, Callable[[], ResNetBackbone | SmallResNet]] = {
    "resnet18": partial(ResNetBackbone, "resnet18"),
    "resnet50": partial(ResNetBackbone, "resnet50"),
    "resnet18-cifar": partial(ResNetBackbone, "resnet18", small_images=True),
    "resnet-small": partial(SmallResNet, (32, 64, 128)),
    "resnet-tiny": partial(SmallResNet, (16, 32, 64)),
}
"""The short names that come with the recipe; every classification network of torchvision has one too."""

Backbone = ResNetBackbone | SmallResNet | ChainBackbone | TransformerBackbone | TimmBackbone


def build_backbone(name: str, *, image_size: int | None = None, zero_init_residual: bool = False) -> Backbone:
    """A freshly initialised backbone.

    Args:
        name: One of `BACKBONES`, a classification network of torchvision by its name there, ``timm:NAME`` of one of
            timm's, or ``module:Class`` of an own one, made without arguments.
        image_size: Side of the images (px), which a transformer's position embeddings depend on; None: 224, or what
            timm makes its network for.
        zero_init_residual: The weight of each residual block's last norm starts at 0 instead of 1, so that every block
            starts as its shortcut (Goyal et al. 2017, section 5.1).

    Raises:
        ValueError: as `check_backbone`, or as `check_residual`.
        PluginError: as `check_backbone`, or the module that the class makes has no integer `num_features`.
    """
    check_backbone(name, image_size)
    if zero_init_residual:
        check_residual(name)
        return _zero_last_norms(BACKBONES[name]() if name in BACKBONES else ResNetBackbone(name))
    if name.startswith(TIMM):
        return TimmBackbone(name.removeprefix(TIMM), image_size=image_size)
    if ":" in name:
        # Not of these classes, but it has their interface.
        return cast(Backbone, _own_backbone(name))
    if name in BACKBONES:
        return BACKBONES[name]()
    return ResNetBackbone(name) if name in resnets() else torchvision_backbone(name, image_size=image_size)


def check_residual(name: str) -> None:
    """Refuse a backbone that has no residual blocks of torchvision's ResNet.

    Raises:
        ValueError: naming those that have.
    """
    if name not in BACKBONES and name not in (known := resnets()):
        raise ValueError(
            f"zero_init_residual is for residual networks, {', '.join(dict.fromkeys((*BACKBONES, *known)))}; "
            f"{name!r} is none of them: set it to false (timm's networks start as timm makes them)"
        )


def check_backbone(name: str, image_size: int | None = None) -> None:
    """Refuse what `build_backbone` cannot build, as far as that is seen without building it.

    Raises:
        ValueError: the name is unknown, or the network does not take images of this size.
        PluginError: ``module:Class`` names no class of modules whose forward pass takes `feature_map`.
    """
    if name in BACKBONES:
        return
    if name.startswith(TIMM):
        check_timm(name.removeprefix(TIMM), image_size)
        return
    if ":" in name:
        _own_class(name)
        return
    try:
        check_torchvision(name, image_size)
    except ValueError as error:
        raise ValueError(
            f"{error}. Short names are {', '.join(BACKBONES)}; a network of timm is {TIMM}NAME, an own "
            "backbone module:Class"
        ) from error


def check_view(name: str, image_size: int, size: int) -> None:
    """Refuse views of `size` px for a backbone that is built for images of `image_size` px and cannot take them.

    Raises:
        ValueError: naming both sizes, or as `check_backbone`.
    """
    if size != image_size and name.startswith(TIMM):
        check_timm(name.removeprefix(TIMM), image_size, size)
    elif size != image_size and name not in BACKBONES and ":" not in name:
        if takes_one_size(name):
            raise ValueError(
                f"{name} is made for one size of images, data.image_size={image_size} px, but a view has {size} px; "
                "give both the same"
            )
        check_backbone(name, size)


def _zero_last_norms(backbone: ResNetBackbone | SmallResNet) -> ResNetBackbone | SmallResNet:
    small = isinstance(backbone, SmallResNet)
    stages = backbone.stages if small else (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4)
    for stage in stages:
        for block in cast(Iterable[nn.Module], stage):
            # The norm of the shortcut is within `downsample`.
            *_, last = (module for module in block.children() if isinstance(module, nn.BatchNorm2d))
            nn.init.zeros_(last.weight)
    return backbone


def _own_class(name: str) -> type[nn.Module]:
    made = resolve(name)
    if not (isinstance(made, type) and issubclass(made, nn.Module)):
        raise PluginError(f"backbone {name!r} is not a subclass of torch.nn.Module")
    if "feature_map" not in inspect.signature(made.forward).parameters:
        raise PluginError(f"backbone {name!r}: its forward must be forward(self, x, feature_map=False)")
    return made


def _own_backbone(name: str) -> nn.Module:
    try:
        backbone = _own_class(name)()
    except TypeError as error:
        raise PluginError(f"backbone {name!r} cannot be made without arguments: {error}") from error
    features = getattr(backbone, "num_features", None)
    if not isinstance(features, int) or isinstance(features, bool) or features < 1:
        raise PluginError(f"backbone {name!r}: num_features must be a positive int, got {features!r}; set it")
    return backbone


def projector(in_features: int, widths: Sequence[int] = (256, 256, 256), *, last_bias: bool = True) -> nn.Sequential:
    """The pretext head: Linear, BatchNorm and ReLU for each width but the last, then one Linear layer.

    Args:
        in_features: Features of the backbone.
        widths: Outputs of each linear layer.
        last_bias: False drops the bias of the last layer.

    Raises:
        ValueError: `widths` is empty or a number is below 1.

    Source: BiSSL, section 4.2.1: two fully connected layers with batch normalisation and ReLU, then a linear one, all
    of 256 neurons.
    """
    if not widths or min(widths) < 1 or in_features < 1:
        raise ValueError(f"in_features and widths must be positive, got {in_features} and {tuple(widths)}")
    layers: list[nn.Module] = []
    for width in widths[:-1]:
        layers += [nn.Linear(in_features, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        in_features = width
    return nn.Sequential(*layers, nn.Linear(in_features, widths[-1], bias=last_bias))


def linear_head(in_features: int, classes: int) -> nn.Linear:
    """The downstream head: one linear layer from pooled features to class scores.

    Raises:
        ValueError: A number is below 1.
    """
    if in_features < 1 or classes < 1:
        raise ValueError(f"in_features and classes must be at least 1, got {in_features} and {classes}")
    return nn.Linear(in_features, classes)
