"""Any classification network of torchvision as a backbone: its classifier removed, its parameter names kept."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_NOT_THE_BODY = ("avgpool", "dropout", "flatten")
"""Children between the last feature map and the classifier."""

_NORMS_BEFORE_THE_LINEAR_LAYER = {"convnext": slice(0, 2), "maxvit": slice(1, 3)}
"""Parts of some families' classifiers that belong to the features: a layer norm (and flattening) after pooling."""

_WITHOUT_AUXILIARY_HEADS: dict[str, dict[str, Any]] = {
    name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")
}


def models() -> ModuleType:
    """torchvision.models, which take nearly as long to import as torch: once a network is one of them."""
    from torchvision import models

    return models


def resnets() -> list[str]:
    """Residual networks of torchvision."""
    return models().list_models(module=models(), include=("resnet*", "resnext*", "wide_resnet*"))


class HardSigmoid(nn.Module):
    """``relu6(x + 3) / 6``: torch's own hard sigmoid, MobileNetV3's gate, cannot be differentiated twice."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return nn.functional.relu6(x + 3.0) / 6.0


class ChainBackbone(nn.Module):
    """A convolutional or windowed network of torchvision whose children run one after another; its classifier removed.

    Features are the mean of the last feature map, followed by the layer norm that ConvNeXt and MaxViT have there. What
    torchvision does between map and classifier otherwise (the 7x7 grid of VGG, the hidden layers of AlexNet, VGG and
    MobileNetV3) goes with the classifier. The weights load into the torchvision model with ``strict=False``.

    Args:
        name: Such a network of torchvision: "mobilenet_v3_small", "convnext_tiny", "swin_t" and so on.
        image_size: Side of the images (px); only MaxViT depends on it.
    """

    def __init__(self, name: str, *, image_size: int | None = None):
        super().__init__()
        network = models().get_model(name, weights=None, **network_options(name, image_size))
        *body, (last, classifier) = network.named_children()
        self._steps: list[str] = []
        for child, module in body:
            if child not in _NOT_THE_BODY:
                # MaxViT keeps its stages in a ModuleList, which does not run by itself.
                self.add_module(child, nn.Sequential(*module) if isinstance(module, nn.ModuleList) else module)
                self._steps.append(child)
        if name.startswith("densenet"):
            # A function of torchvision's forward pass.
            self.add_module("relu", nn.ReLU(inplace=True))
            self._steps.append("relu")
        self._tail = last
        self.add_module(last, _norm(name, classifier))
        self.num_features = _width(network, classifier)
        # Decides how state dicts are read: MNASNet's had another meaning once.
        self._version = network._version
        for module in list(self.modules()):
            for child, gate in module.named_children():
                if isinstance(gate, nn.Hardsigmoid):
                    setattr(module, child, HardSigmoid())

    def forward(self, x: Tensor, feature_map: bool = False) -> Tensor:
        """Features of images ``[N, 3, H, W]``."""
        for step in self._steps:
            x = self.get_submodule(step)(x)
        if feature_map:
            return x
        return self.get_submodule(self._tail)(x.mean(dim=(2, 3), keepdim=True))


class TransformerBackbone(nn.Module):
    """A vision transformer of torchvision without its classifier.

    Features are those of the class token; the feature map is that of the patch tokens, arranged as a grid. The weights
    load into the torchvision model of the same image size with ``strict=False``.

    Args:
        name: "vit_b_16" and so on.
        image_size: Side of the images (px), a multiple of the patches'; no other size is taken. None: 224.
    """

    def __init__(self, name: str, *, image_size: int | None = None):
        super().__init__()
        network = models().get_model(name, weights=None, **network_options(name, image_size))
        self.image_size, self.num_features = network.image_size, network.hidden_dim
        self.class_token = network.class_token
        self.conv_proj = network.conv_proj
        self.encoder = network.encoder

    def forward(self, x: Tensor, feature_map: bool = False) -> Tensor:
        """Features of images ``[N, 3, image_size, image_size]``."""
        if x.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"the backbone was made for images of {self.image_size} px, got {tuple(x.shape[-2:])}; give the views "
                "of both tasks the size data.image_size"
            )
        patches = self.conv_proj(x)
        tokens = patches.flatten(2).transpose(1, 2)
        tokens = self.encoder(torch.cat([self.class_token.expand(len(x), -1, -1), tokens], dim=1))
        if feature_map:
            return tokens[:, 1:].transpose(1, 2).unflatten(2, patches.shape[2:])
        return tokens[:, 0]


def check_torchvision(name: str, image_size: int | None = None) -> None:
    """Refuse a name that torchvision has no classification network for, or images that it cannot take.

    Raises:
        ValueError: naming what came and what fits.
    """
    if name not in models().list_models(module=models()):
        raise ValueError(
            f'torchvision has no classification network {name!r}; python -c "from torchvision import models; '
            'print(models.list_models(module=models))" lists them'
        )
    if image_size is None or name.startswith("swin"):
        return
    if takes_one_size(name):
        # Patches of a transformer; windows of 7 on each of MaxViT's grids, the last of which is 32 times smaller.
        step = int(name.rpartition("_")[2]) if name.startswith("vit") else 7 * 32
        if image_size % step:
            raise ValueError(f"{name} takes images whose side is a multiple of {step} px, not {image_size}")
        return
    smallest = max(models().get_model_weights(name).DEFAULT.meta["min_size"])
    if image_size < smallest:
        raise ValueError(f"{name} takes images of at least {smallest} px, not {image_size}")


def takes_one_size(name: str) -> bool:
    """Whether the network has weights for each position or window, so that it takes the size that it was made for."""
    return name.startswith(("vit", "maxvit"))


def torchvision_backbone(name: str, *, image_size: int | None = None) -> ChainBackbone | TransformerBackbone:
    """A freshly initialised network other than a ResNet.

    Raises:
        ValueError: as `check_torchvision`.
    """
    check_torchvision(name, image_size)
    make: Callable[..., ChainBackbone | TransformerBackbone] = (
        TransformerBackbone if name.startswith("vit") else ChainBackbone
    )
    return make(name, image_size=image_size)


def network_options(name: str, image_size: int | None) -> dict[str, Any]:
    """Arguments of ``torchvision.models.get_model`` besides the name that make the same body."""
    if name.startswith("vit") and image_size:
        return {"image_size": image_size}
    if name.startswith("maxvit") and image_size:
        return {"input_size": (image_size, image_size)}
    return dict(_WITHOUT_AUXILIARY_HEADS.get(name, {}))


def _norm(name: str, classifier: nn.Module) -> nn.Sequential:
    """What of the classifier belongs to the features, under the names it has there."""
    for family, part in _NORMS_BEFORE_THE_LINEAR_LAYER.items():
        if name.startswith(family):
            assert isinstance(classifier, nn.Sequential)
            return classifier[part]
    return nn.Sequential(nn.Flatten())


def _width(network: nn.Module, classifier: nn.Module) -> int:
    """Channels of the last feature map: inputs of the classifier, of which the older networks have a grid each."""
    first = next(weight for weight in classifier.parameters() if weight.dim() > 1)
    pooling = dict(network.named_children()).get("avgpool")
    if not isinstance(pooling, nn.AdaptiveAvgPool2d):
        return first.shape[1]
    size = pooling.output_size
    height, width = size if isinstance(size, tuple) else (size, size)
    return first.shape[1] // ((height or 1) * (width or 1))
