"""Views of image batches: random ones from drawn parameters, and the deterministic one of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from .batched_views import SOLARIZE_THRESHOLD, apply_view_batched, checked_images, move, move_matrices, moves, normalize
from .view_policy import IMAGENET_MEAN, IMAGENET_STD, ViewParameters, ViewPolicy, draw

__all__ = [
    "EvalView",
    "RandomView",
    "ViewParameters",
    "ViewPolicy",
    "apply_view",
    "apply_view_batched",
    "draw",
    "eval_resize",
]

RESAMPLING = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}


def _three_channels(images: Tensor) -> Tensor:
    """Checked images; one grey channel is repeated, without a copy."""
    return checked_images(images).expand(-1, 3, -1, -1)


def _unit_range(images: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in [0, 1]."""
    return images.to(torch.float32).div_(255)


def _resized(images: Tensor, size: list[int], interpolation: str) -> Tensor:
    """Antialiased resize of float images in [0, 1]; a size of [side] is the shorter side."""
    # Bicubic weights are partly negative and overshoot. Float, because 8-bit resizing rounds differently by device.
    return F.resize(images, size, RESAMPLING[interpolation], antialias=True).clamp_(0, 1)


def _jitter(image: Tensor, parameters: ViewParameters, index: int) -> Tensor:
    """The four colour changes in the drawn order; one whose factor changes nothing is skipped."""
    for operation in parameters.order[index].tolist():
        if operation == 0 and (factor := parameters.brightness[index].item()) != 1:
            image = F.adjust_brightness(image, factor)
        elif operation == 1 and (factor := parameters.contrast[index].item()) != 1:
            image = F.adjust_contrast(image, factor)
        elif operation == 2 and (factor := parameters.saturation[index].item()) != 1:
            image = F.adjust_saturation(image, factor)
        elif operation == 3 and (factor := parameters.hue[index].item()) != 0:
            image = F.adjust_hue(image, factor)
    return image


def _affine(image: Tensor, parameters: ViewParameters, index: int) -> Tensor:
    """Rotation, shift and zoom about the centre, bilinear, black outside."""
    angle, zoom = parameters.angle[index].item(), parameters.zoom[index].item()
    shift = parameters.translate[index].tolist()
    if angle == 0 and zoom == 1 and shift == [0, 0]:
        return image
    side = image.shape[-1]
    return F.affine(
        image,
        angle=angle,
        translate=[part * side for part in shift],
        scale=zoom,
        shear=[0.0, 0.0],
        interpolation=InterpolationMode.BILINEAR,
    )


def _cropped(policy: ViewPolicy, images: Tensor, parameters: ViewParameters, index: int) -> Tensor:
    """One image or a batch, by the crop at `index`, at the policy's size; uint8 to float32 in [0, 1]."""
    cropped = F.crop(
        images,
        top=int(parameters.top[index]),
        left=int(parameters.left[index]),
        height=int(parameters.height[index]),
        width=int(parameters.width[index]),
    )
    return _resized(_unit_range(cropped), [policy.size, policy.size], policy.interpolation)


def _one_view(policy: ViewPolicy, image: Tensor, parameters: ViewParameters, index: int) -> Tensor:
    """The view of one uint8 image [3, H, W] by the parameters at `index`; float32 in [0, 1], not yet normalised."""
    image = _cropped(policy, image, parameters, index)
    if parameters.flip[index]:
        image = F.horizontal_flip(image)
    image = _affine(image, parameters, index)
    if parameters.jitter[index]:
        image = _jitter(image, parameters, index)
    if parameters.grey[index]:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if parameters.blur[index]:
        sigma = parameters.sigma[index].item()
        image = F.gaussian_blur(image, [policy.kernel_size, policy.kernel_size], [sigma, sigma])
    if parameters.solarize[index]:
        image = F.solarize(image, SOLARIZE_THRESHOLD)
    return image


def _views_one_by_one(policy: ViewPolicy, images: Tensor, parameters: ViewParameters) -> Tensor:
    """The reference: every sample by itself through torchvision's functions."""
    views = torch.empty(len(images), 3, policy.size, policy.size)
    for index, image in enumerate(images):
        views[index] = _one_view(policy, image, parameters, index)
    return views


def _same_box_no_colour(parameters: ViewParameters) -> bool:
    """Whether every sample has the same crop and none a colour change or a blur."""
    boxes = torch.stack((parameters.top, parameters.left, parameters.height, parameters.width))
    return bool((boxes == boxes[:, :1]).all()) and not bool((parameters.jitter | parameters.blur).any())


def _views_at_once(policy: ViewPolicy, images: Tensor, parameters: ViewParameters, moving: bool) -> Tensor:
    """The same views, all at a time, resampled if `moving`; only for `_same_box_no_colour` parameters."""
    views = _cropped(policy, images, parameters, 0)

    def where(mask: Tensor, changed: Tensor) -> Tensor:
        return torch.where(mask.view(-1, 1, 1, 1), changed, views)

    if parameters.flip.any():
        views = where(parameters.flip, views.flip(-1))
    if moving:
        views = move(views, move_matrices(parameters))
    if parameters.grey.any():
        views = where(parameters.grey, F.rgb_to_grayscale(views, num_output_channels=3))
    if parameters.solarize.any():
        views = where(parameters.solarize, F.solarize(views, SOLARIZE_THRESHOLD))
    return views


def apply_view(policy: ViewPolicy, images: Tensor, parameters: ViewParameters, rows: slice = slice(None)) -> Tensor:
    """Views of `images` (uint8 [N, 1 or 3, H, W], CPU) by `parameters`: float32 [N, 3, size, size], normalised.

    Only those of the samples in `rows` are made and returned, the same bits as among all of them.

    Sample i is cropped, mapped to [0, 1], resized, then flipped, moved, coloured, greyed, blurred,
    solarised, and at last (x - mean) / std, each step only where it was drawn. Greyscale images become three equal
    channels first. Small images with neither colour changes nor crops go through at once, with the same result.
    Raises ValueError if `images` has another type or shape, or another length than `parameters`.
    """
    checked, own = checked_images(images, parameters)[rows], parameters[rows]
    # The whole batch decides how a sample is computed, so that a part of it comes out alike.
    if len(own) and _same_box_no_colour(parameters):
        views = _views_at_once(policy, _three_channels(checked), own, moves(parameters))
    else:
        views = _views_one_by_one(policy, _three_channels(checked), own)
    return normalize(views, policy.mean, policy.std)


@dataclass(frozen=True)
class RandomView:
    """One random view of every image: `RandomView(policy)(images, generator)`, drawn and applied.

    By `apply_view`, image by image through torchvision, or by `apply_view_batched` if `batched` is true or the images
    are not on the CPU. The draws are the same, and the views but for float32 rounding.
    """

    policy: ViewPolicy
    batched: bool = False

    def __call__(self, images: Tensor, generator: torch.Generator, rows: slice = slice(None)) -> Tensor:
        """Views of uint8 `images` [N, 1 or 3, H, W]: float32 [N, 3, size, size] on their device.

        `generator` is a CPU one; it gives numbers for all N, of which the views in `rows` are made and returned.
        Raises ValueError as `apply_view`.
        """
        height, width = checked_images(images).shape[-2:]
        parameters = draw(self.policy, len(images), height, width, generator)
        batched = self.batched or images.device.type != "cpu"
        return (apply_view_batched if batched else apply_view)(self.policy, images, parameters, rows)


def eval_resize(size: int) -> int:
    """The side in px to resize to before a central crop of `size`: int(size * 256 / 224); 256 for 224, 109 for 96."""
    return size * 256 // 224


@dataclass(frozen=True)
class EvalView:
    """The view of an evaluation: shorter side to `resize` px, central square of `crop` px, (x / 255 - mean) / std.

    Images whose shorter side is `resize` already are not resampled. Resampling is antialiased. The paper's evaluation
    is `EvalView(eval_resize(96), 96)`. Raises ValueError if `crop` is below 1 or above `resize`, or a std not positive.
    """

    resize: int
    crop: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: Literal["bicubic", "bilinear"] = "bilinear"

    def __post_init__(self) -> None:
        if not 1 <= self.crop <= self.resize:
            raise ValueError(f"crop must be between 1 and resize = {self.resize}, got {self.crop}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive in every channel, got {self.std}")
        if self.interpolation not in RESAMPLING:
            raise ValueError(f"interpolation must be one of {', '.join(RESAMPLING)}, got {self.interpolation!r}")

    def __call__(self, images: Tensor) -> Tensor:
        """Views of uint8 `images` [N, 1 or 3, H, W]: float32 [N, 3, crop, crop]. Raises ValueError on another type."""
        resized = _resized(_unit_range(_three_channels(images)), [self.resize], self.interpolation)
        return normalize(F.center_crop(resized, [self.crop, self.crop]).clone(), self.mean, self.std)
