"""One random view written out with torchvision's first-generation functions, and images to try it on."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as V1

from recipes.vision.views.crops import box_of
from recipes.vision.views.view_policy import ViewParameters, ViewPolicy

PLAIN: dict[str, Any] = dict(
    crop_scale=(1, 1),
    crop_ratio=(1, 1),
    flip_probability=0,
    jitter_probability=0,
    grey_probability=0,
    mean=(0, 0, 0),
    std=(1, 1, 1),
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photographs(count: int, height: int, width: int, channels: int = 3, seed: int = 1) -> Tensor:
    """Smooth random images: noise at a quarter of the size, enlarged."""
    coarse = torch.rand(count, channels, max(2, height // 4), max(2, width // 4), generator=generator(seed))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (smooth * 255).round().to(torch.uint8)


def policy_of(**fields: Any) -> ViewPolicy:
    return ViewPolicy.model_validate(fields)


def reference_view(policy: ViewPolicy, image: Tensor, parameters: ViewParameters, index: int) -> Tensor:
    """The view of one image uint8 [3, H, W], in float throughout."""
    at = {field.name: getattr(parameters, field.name)[index].tolist() for field in dataclasses.fields(parameters)}
    mode = InterpolationMode(policy.interpolation)
    box = box_of(at["area"], at["aspect"], at["place"], policy.crop_ratio, *image.shape[-2:])
    out = V1.resized_crop(image.float() / 255, *box, [policy.size] * 2, mode, antialias=True).clamp(0, 1)
    if at["flip"]:
        out = V1.hflip(out)
    tikhonov = [part * policy.size for part in at["translate"]]
    out = V1.affine(out, at["angle"], tikhonov, at["zoom"], [0.0, 0.0], InterpolationMode.BILINEAR)  # pyright: ignore
    if at["jitter"]:
        for operation in at["order"]:
            name = ("brightness", "contrast", "saturation", "hue")[operation]
            out = getattr(V1, f"adjust_{name}")(out, at[name])
    if at["grey"]:
        out = V1.rgb_to_grayscale(out, 3)
    if at["blur"]:
        out = V1.gaussian_blur(out, [policy.kernel_size] * 2, [at["sigma"]] * 2)
    if at["solarize"]:
        out = V1.solarize(out, 128 / 255)
    return V1.normalize(out, list(policy.mean), list(policy.std))


def reference_views(policy: ViewPolicy, images: Tensor, parameters: ViewParameters) -> Tensor:
    """The views of a batch [N, 1 or 3, H, W], one after another."""
    three = images.expand(-1, 3, -1, -1)
    return torch.stack([reference_view(policy, image, parameters, index) for index, image in enumerate(three)])
