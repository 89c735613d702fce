"""Any classification network of timm as a backbone, by ``timm:NAME``: its classifier removed, its weights random."""

import difflib
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor, nn

from .torchvision_backbones import HardSigmoid

TIMM = "timm:"
"""What a name begins with that is one of timm's."""


class TimmBackbone(nn.Module):
    """A network of timm without its classifier, in the submodule `network`, whose weights keep timm's names.

    Features are those that timm's own classifier gets: pooled as the network does it (mean, class token, attention),
    with the norm or the hidden layer that follows there. The feature map is what they are pooled from, for a
    transformer the grid of its patch tokens. timm's BatchNorm with an activation inside becomes torch's with the
    activation behind it, so that several processes can synchronise it; torch's hard sigmoid, which cannot be
    differentiated twice, becomes an equal one.

    Args:
        name: in timm, without a tag: "resnet10t", "vit_tiny_patch16_224" and so on.
        image_size: Side of the images (px), which networks with weights for each position are made for; None: timm's.

    Raises:
        ValueError: timm is not installed, has no such network, or cannot make it for this size.
    """

    def __init__(self, name: str, *, image_size: int | None = None):
        super().__init__()
        try:
            self.network = package(name).create_model(name, num_classes=0, **timm_options(name, image_size))
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"timm cannot make {name} for images of {image_size} px: {_line(error)}") from error
        self.num_features: int = self.network.head_hidden_size
        self._name = name
        for module in list(self.network.modules()):
            _adapt(module)

    def forward(self, x: Tensor, feature_map: bool = False) -> Tensor:
        """Features of images ``[N, 3, H, W]``.

        Raises:
            ValueError: the network has no feature map of `num_features` channels.
        """
        return self._map(x) if feature_map else self.network(x)

    def _map(self, x: Tensor) -> Tensor:
        found = self.network.forward_features(x)
        if isinstance(found, Tensor) and found.dim() == 4:
            found = found if found.shape[1] == self.network.num_features else found.permute(0, 3, 1, 2)
        else:
            # Tokens, which this arranges as a grid.
            found = self.network.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[-1]
        if found.shape[1] != self.num_features:
            raise ValueError(
                f"{TIMM}{self._name} has no feature map for its {self.num_features} features: its last map has "
                f"{found.shape[1]} channels, and another layer follows; take another backbone for this task"
            )
        return found


def package(name: str) -> ModuleType:
    """timm, which takes nearly as long to import as torch: once the network `name` is one of it.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ValueError(f"{TIMM}{name} needs the package timm: pip install 'bilevel[timm]'") from error
    return timm


def check_timm(name: str, image_size: int | None = None, view: int | None = None) -> None:
    """Refuse a name that timm does not have, images that its network cannot be made for, or views that it cannot take.

    Args:
        name: without the prefix.
        image_size: px that the network is made for; None: whatever timm makes it for, and no image is tried.
        view: px of the images that it gets; None: `image_size`.

    Raises:
        ValueError: naming what came and what fits, or the extra where timm is not installed.
    """
    timm = package(name)
    bare, dot, _ = name.partition(".")
    if not timm.is_model(bare):
        near = ", ".join(difflib.get_close_matches(bare, timm.list_models(), 4, 0.5))
        raise ValueError(
            f'timm has no network {bare!r}{near and f"; it has {near}"}; python -c "import timm; '
            'print(timm.list_models())" lists them'
        )
    if dot:
        raise ValueError(
            f"{TIMM}{name} names pretrained weights, which are not downloaded; use {TIMM}{bare}, and name a file of "
            "weights with model.init_backbone"
        )
    if image_size is not None and (why := _misfit(name, image_size, view or image_size)):
        made = "" if view in (None, image_size) else f", made for images of {image_size} px,"
        raise ValueError(f"{TIMM}{name}{made} does not take images of {view or image_size} px: {why}")


def timm_options(name: str, image_size: int | None) -> dict[str, int]:
    """Arguments of ``timm.create_model`` besides the name and the number of classes that make the same network."""
    made = package(name).get_pretrained_cfg(name)
    fixed = made is not None and made.fixed_input_size
    return {"img_size": image_size} if fixed and image_size else {}


@lru_cache(maxsize=64)
def _misfit(name: str, image_size: int, view: int) -> str:
    """Why a network made for `image_size` does not take images of `view` px, found without memory for its weights."""
    try:
        with torch.device("meta"), torch.no_grad():
            features = TimmBackbone(name, image_size=image_size).eval()(torch.zeros(2, 3, view, view))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        return _line(error)
    return "" if features.dim() == 2 and min(features.shape) else f"its features are of shape {list(features.shape)}"


def _adapt(module: nn.Module) -> None:
    """Replaces what hinders second derivatives and synchronised statistics; names in the state dict stay."""
    if isinstance(module, nn.BatchNorm2d) and {"drop", "act"} <= module._modules.keys():
        # Another object would lose hooks, and the places that share or hold the layer.
        module.__class__ = nn.BatchNorm2d
        module.register_forward_hook(_activate)
    for name, child in module.named_children():
        if isinstance(child, nn.Hardsigmoid):
            setattr(module, name, HardSigmoid())


def _activate(norm: nn.Module, _: tuple[Tensor, ...], normalised: Tensor) -> Tensor:
    return norm.get_submodule("act")(norm.get_submodule("drop")(normalised))


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
