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

    The crop is drawn in units that do not hang on a picture's size, which `crops.boxes` turns into pixels: ten
    attempts, `area` (fraction of the picture's) and `aspect` (width / height), float64 [count, 10], and `place`
    (vertical, horizontal; fraction of the room that a crop leaves), float64 [count, 2].
    `flip, jitter, grey, blur, solarize` (bool).
    `angle` (degrees, clockwise), `translate` [count, 2] (x, y; fraction of the
    side), `zoom` (factor). `brightness, contrast, saturation` (factors), `hue` (turns); `order` [count, 4] (int64):
    the sequence of these four, as 0, 1, 2, 3. `sigma` (px). Other floats are float32; values of operations that are off
    are drawn all the same, so that a probability never shifts the draws of another field.
    """

    area: Tensor
    aspect: Tensor
    place: Tensor
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
        return len(self.flip)

    def __getitem__(self, part: slice) -> ViewParameters:
        """The parameters of some of the views."""
        return ViewParameters(**{field.name: getattr(self, field.name)[part] for field in fields(self)})


def _uniform(low: float, high: float, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Uniform numbers in [low, high], float64."""
    return low + (high - low) * torch.rand(tuple(shape), generator=generator, dtype=torch.float64)


def draw(policy: ViewPolicy, count: int, generator: torch.Generator) -> ViewParameters:
    """Parameters of `count` independent views of pictures of any sizes, all from the CPU `generator`.

    The distributions are those of torchvision's RandomResizedCrop, RandomHorizontalFlip, RandomAffine (without its
    rounding of shifts to whole pixels), ColorJitter and RandomApply; every sample has its own values and order. The
    same generator state gives the same parameters. Raises ValueError if `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")

    def chance(probability: float) -> Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64) < probability

    def value(low: float, high: float, *trailing: int) -> Tensor:
        return _uniform(low, high, (count, *trailing), generator).float()

    def factor(strength: float) -> Tensor:
        return value(max(0.0, 1 - strength), 1 + strength)

    low, high = policy.crop_ratio
    return ViewParameters(
        area=_uniform(*policy.crop_scale, (count, CROP_ATTEMPTS), generator),
        aspect=_uniform(math.log(low), math.log(high), (count, CROP_ATTEMPTS), generator).exp(),
        place=torch.rand(count, 2, generator=generator, dtype=torch.float64),
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
