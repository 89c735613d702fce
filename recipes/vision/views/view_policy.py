"""The distribution of one random view of an image, and draws from it; nothing here touches a pixel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP_ATTEMPTS = 10


def odd_tenth(side: int) -> int:
    """The odd number of pixels nearest to a tenth of `side`, at least 3: 9 at 96, 23 at 224."""
    return max(3, 2 * (side // 20) + 1)


class ViewPolicy(BaseModel):
    """The distribution of one random view, applied in the order of the fields: crop, flip, move, colour, blur.

    The defaults are the values of VICReg (Bardes et al., 2022) as the paper uses them (its pretext augmentation), with
    the minimal crop of 0.5 read as an area: bicubic random resized crop with area (0.5, 1) and aspect (3/4, 4/3); flip
    0.5; colour jitter (0.4, 0.4, 0.2, 0.1) with probability 0.8; greyscale 0.2; blur sigma in (0.1, 2.0). Blur and
    solarisation differ between the two views and are off here: view 1 has `blur_probability=1.0`, view 2 has
    `blur_probability=0.1, solarize_probability=0.2`.

    Area and aspect are separate: the other reading of the same sentence, (0.5, 1) as the aspect, is
    `crop_scale=(0.08, 1), crop_ratio=(0.5, 1)`. With both at (1, 1) nothing is cropped (a non-square image still
    becomes its central square). Raises pydantic's ValidationError, a ValueError, on any value outside its range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    size: int = Field(ge=1, description="side of the square view (px)")
    crop_scale: tuple[float, float] = Field(
        default=(0.5, 1.0), description="range of the crop's area (fraction of the image)"
    )
    crop_ratio: tuple[float, float] = Field(
        default=(3 / 4, 4 / 3), description="range of the crop's aspect, width / height"
    )
    interpolation: Literal["bicubic", "bilinear"] = Field(
        default="bicubic", description="resampling of the crop, antialiased"
    )
    flip_probability: float = Field(default=0.5, ge=0, le=1, description="probability of a horizontal flip")
    rotation: float = Field(default=0.0, ge=0, le=180, description="largest rotation either way (degrees)")
    translation: float = Field(
        default=0.0, ge=0, le=1, description="largest shift either way, each axis (fraction of the side)"
    )
    zoom: tuple[float, float] = Field(
        default=(1.0, 1.0), description="range of the magnification about the centre (factor)"
    )
    jitter_probability: float = Field(
        default=0.8, ge=0, le=1, description="probability of the four colour changes together"
    )
    brightness: float = Field(default=0.4, ge=0, description="brightness factor within 1 -/+ this, not below 0")
    contrast: float = Field(default=0.4, ge=0, description="contrast factor within 1 -/+ this, not below 0")
    saturation: float = Field(default=0.2, ge=0, description="saturation factor within 1 -/+ this, not below 0")
    hue: float = Field(
        default=0.1, ge=0, le=0.5, description="largest hue shift either way (turns of the colour circle)"
    )
    grey_probability: float = Field(default=0.2, ge=0, le=1, description="probability of greyscale")
    blur_probability: float = Field(default=0.0, ge=0, le=1, description="probability of a Gaussian blur")
    blur_sigma: tuple[float, float] = Field(
        default=(0.1, 2.0), description="range of the blur's standard deviation (px)"
    )
    blur_kernel: int | None = Field(
        default=None,
        ge=1,
        description="odd side of the blur's kernel (px); empty: the odd number nearest size / 10, at least 3",
    )
    solarize_probability: float = Field(
        default=0.0, ge=0, le=1, description="probability of solarisation (threshold 128 / 255)"
    )
    mean: tuple[float, float, float] = Field(
        default=IMAGENET_MEAN, description="subtracted per channel, from values in [0, 1]"
    )
    std: tuple[float, float, float] = Field(default=IMAGENET_STD, description="divisor per channel, after the mean")

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name in ("crop_scale", "crop_ratio", "zoom", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be (low, high) with 0 < low <= high, got {(low, high)}")
        if self.crop_scale[1] > 1:
            raise ValueError(f"crop_scale is a fraction of the image's area: at most 1, got {self.crop_scale}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive in every channel, got {self.std}")
        if self.blur_kernel is not None and self.blur_kernel % 2 == 0:
            raise ValueError(f"blur_kernel must be odd, got {self.blur_kernel}")
        if self.blur_probability > 0 and self.kernel_size // 2 >= self.size:
            raise ValueError(f"a blur kernel of {self.kernel_size} px does not fit a view of {self.size} px")
        return self

    def describe_crop(self) -> str:
        """The crop in words: what is a share of the area and what is an aspect."""
        if self.crop_scale == self.crop_ratio == (1.0, 1.0):
            return f"no crop, {self.size} px"
        (low, high), (narrow, wide) = self.crop_scale, self.crop_ratio
        return (
            f"random crop of {low:g} to {high:g} of the image's area, width / height {narrow:.3g} to {wide:.3g}, "
            f"resized to {self.size} px"
        )

    @property
    def kernel_size(self) -> int:
        """Side of the blur's kernel in px; at the paper's 96 px it is 9, which is +-2 sigma at the largest sigma.

        VICReg's code blurs by PIL, whose kernel grows with sigma; a tenth of the side is BYOL's and SimCLR's choice.
        """
        return odd_tenth(self.size) if self.blur_kernel is None else self.blur_kernel


@dataclass(frozen=True, eq=False)
class ViewParameters:
    """Everything random in `count` views: CPU tensors of leading size `count`, enough to make the views again anywhere.

    `top, left, height, width` (int64, px of the source image): the crop. `flip, jitter, grey, blur, solarize` (bool).
    `angle` (degrees, clockwise), `translate` [count, 2] (x, y; fraction of the
    side), `zoom` (factor). `brightness, contrast, saturation` (factors), `hue` (turns); `order` [count, 4] (int64):
    the sequence of these four, as 0, 1, 2, 3. `sigma` (px). Floats are float32; values of operations that are off are
    drawn all the same, so that a probability never shifts the draws of another field.
    """

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor
    angle: Tensor
    translate: Tensor
    zoom: Tensor
    jitter: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    order: Tensor
    grey: Tensor
    blur: Tensor
    sigma: Tensor
    solarize: Tensor

    def __len__(self) -> int:
        return len(self.top)

    def __getitem__(self, part: slice) -> ViewParameters:
        """The parameters of some of the views."""
        return ViewParameters(**{field.name: getattr(self, field.name)[part] for field in fields(self)})


def _uniform(low: float, high: float, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Uniform numbers in [low, high], float64."""
    return low + (high - low) * torch.rand(tuple(shape), generator=generator, dtype=torch.float64)


def _central_crop(ratio: tuple[float, float], height: int, width: int) -> tuple[int, int, int, int]:
    """The largest central crop whose aspect lies within `ratio`: top, left, height, width."""
    if width / height < ratio[0]:
        crop_height, crop_width = round(width / ratio[0]), width
    elif width / height > ratio[1]:
        crop_height, crop_width = height, round(height * ratio[1])
    else:
        crop_height, crop_width = height, width
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _draw_crops(
    policy: ViewPolicy, count: int, height: int, width: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Crop boxes distributed as RandomResizedCrop's: the first of ten attempts that fits, else central."""
    area = height * width * _uniform(*policy.crop_scale, (count, CROP_ATTEMPTS), generator)
    low, high = policy.crop_ratio
    aspect = _uniform(math.log(low), math.log(high), (count, CROP_ATTEMPTS), generator).exp()
    widths, heights = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    # argmax of a 0/1 tensor is the first attempt that fits; where none does, the value is replaced below.
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    crop_width, crop_height = widths.gather(1, first).squeeze(1), heights.gather(1, first).squeeze(1)
    position = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    top = (position[:, 0] * (height - crop_height + 1)).long()
    left = (position[:, 1] * (width - crop_width + 1)).long()
    fitted = fits.any(dim=1)
    box = zip((top, left, crop_height, crop_width), _central_crop(policy.crop_ratio, height, width), strict=True)
    top, left, crop_height, crop_width = (torch.where(fitted, drawn, central) for drawn, central in box)
    return top, left, crop_height, crop_width


def draw(policy: ViewPolicy, count: int, height: int, width: int, generator: torch.Generator) -> ViewParameters:
    """Parameters of `count` independent views of images of `height` x `width` px, all from the CPU `generator`.

    The distributions are those of torchvision's RandomResizedCrop, RandomHorizontalFlip, RandomAffine (without its
    rounding of shifts to whole pixels), ColorJitter and RandomApply; every sample has its own values and order. The
    same generator state gives the same parameters. Raises ValueError if `count`, `height` or `width` is below 1.
    """
    if min(count, height, width) < 1:
        raise ValueError(f"count, height and width must be at least 1, got {count}, {height}, {width}")

    def chance(probability: float) -> Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64) < probability

    def value(low: float, high: float, *trailing: int) -> Tensor:
        return _uniform(low, high, (count, *trailing), generator).float()

    def factor(strength: float) -> Tensor:
        return value(max(0.0, 1 - strength), 1 + strength)

    top, left, crop_height, crop_width = _draw_crops(policy, count, height, width, generator)
    return ViewParameters(
        top=top,
        left=left,
        height=crop_height,
        width=crop_width,
        flip=chance(policy.flip_probability),
        angle=value(-policy.rotation, policy.rotation),
        translate=value(-policy.translation, policy.translation, 2),
        zoom=value(*policy.zoom),
        jitter=chance(policy.jitter_probability),
        brightness=factor(policy.brightness),
        contrast=factor(policy.contrast),
        saturation=factor(policy.saturation),
        hue=value(-policy.hue, policy.hue),
        order=torch.rand(count, 4, generator=generator, dtype=torch.float64).argsort(dim=1),
        grey=chance(policy.grey_probability),
        blur=chance(policy.blur_probability),
        sigma=value(*policy.blur_sigma),
        solarize=chance(policy.solarize_probability),
    )
