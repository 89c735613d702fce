"""The view of an evaluation: deterministic, of the whole picture's centre."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .batched_views import checked_images, normalize
from .crops import central_view
from .view_policy import IMAGENET_MEAN, IMAGENET_STD

INTERPOLATIONS = ("bicubic", "bilinear")


def eval_resize(size: int) -> int:
    """The side in px to resize to before a central crop of `size`: int(size * 256 / 224); 256 for 224, 109 for 96."""
    return size * 256 // 224


@dataclass(frozen=True)
class EvalView:
    """The view of an evaluation: shorter side to `resize` px, central square of `crop` px, (x / 255 - mean) / std.

    Resampling is antialiased, of the original picture, to uint8; a shorter side of `resize` px is not resampled. The
    paper's evaluation is ``EvalView(eval_resize(96), 96)``.

    Raises:
        ValueError: `crop` is below 1 or above `resize`, a std is not positive, or another interpolation.
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
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {self.interpolation!r}")

    def finish(self, crops: Tensor) -> Tensor:
        """Crops uint8 [N, 1 or 3, crop, crop] as inputs: float32 [N, 3, crop, crop], on their device."""
        inputs = checked_images(crops).expand(-1, 3, -1, -1).to(torch.float32, memory_format=torch.contiguous_format)
        return normalize(inputs.div_(255), self.mean, self.std)

    def __call__(self, pictures: Tensor) -> Tensor:
        """Inputs of pictures of one size, uint8 [N, 1 or 3, H, W] on a CPU. Raises ValueError on another type."""
        return self.finish(central_view(checked_images(pictures), self.resize, self.crop, self.interpolation))
