"""Linear steps along one axis of batched pictures, as weighted sums of a few rows: resizing and blur."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

KERNEL_RADIUS = {"bicubic": 2.0, "bilinear": 1.0}


@dataclass(frozen=True, eq=False)
class Taps:
    """Weights [n, S, K] of the K input rows at `indices` [n, S, K] that make each of S output rows."""

    indices: Tensor
    weights: Tensor

    def sums(self, rows: Tensor) -> Tensor:
        """[n, R, C, F] to [n, S, C, F], each output row the weighted sum of its K rows."""
        count, inputs, channels, features = rows.shape
        first = torch.arange(0, count * inputs, inputs, dtype=torch.int32, device=rows.device)
        indices = (self.indices + first.view(-1, 1, 1)).flatten(0, 1)
        # A single grey image would come as a strided view, which is summed in another order.
        table, weights = rows.reshape(-1, channels * features).contiguous(), self.weights.flatten(0, 1)
        sums = functional.embedding_bag(indices, table, mode="sum", per_sample_weights=weights)
        return sums.view(count, -1, channels, features)


def _cubic(x: Tensor) -> Tensor:
    """The cubic convolution kernel with a = -1/2, which antialiased resizing uses; zero beyond 2."""
    x = x.abs().clamp_max_(2)
    inner, outer = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    return torch.where(x < 1, inner, outer)


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp_min_(0)


def resize_taps(
    interpolation: str, start: Tensor, length: Tensor, flip: Tensor | None, size: int, extent: int, longest: int
) -> Taps:
    """Antialiased resize of the pixels [start, start + length) of `extent` to `size`, mirrored where `flip`.

    Downscaling widens the kernel by the scale; at the crop's borders it is cut off and renormalised.
    `longest` is the greatest length, known on the CPU.
    """
    radius = KERNEL_RADIUS[interpolation]
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1)
    scale = length / size
    stretch = scale.clamp_min(1)
    position = torch.arange(size, device=start.device).view(1, -1, 1) + 0.5
    if flip is not None:
        position = torch.where(flip.view(-1, 1, 1) > 0, size - position, position)
    centre = start + scale * position
    taps = torch.arange(math.ceil(2 * radius * max(1.0, longest / size)), device=start.device)
    indices = (centre - radius * stretch + 0.5).floor() + taps
    distances = (indices + 0.5 - centre) / stretch
    weights = _cubic(distances) if interpolation == "bicubic" else _triangle(distances)
    weights = torch.where((indices >= start) & (indices < start + length), weights, 0.0)
    return Taps(indices.clamp_(0, extent - 1).int(), weights / weights.sum(dim=-1, keepdim=True))


def blur_taps(sigma: Tensor, kernel_size: int, size: int) -> Taps:
    """Gaussian weights of `kernel_size` neighbours, reflected at the borders without repeating the border pixel."""
    offsets = torch.arange(kernel_size, device=sigma.device) - kernel_size // 2
    indices = (torch.arange(size, device=sigma.device).view(-1, 1) + offsets).abs()
    indices = torch.minimum(indices, 2 * (size - 1) - indices).int().expand(len(sigma), -1, -1)
    weights = (-0.5 * (offsets / sigma.view(-1, 1)).square()).exp()
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return Taps(indices, weights.unsqueeze(1).expand(-1, size, -1))
