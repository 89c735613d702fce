"""Features of pictures by patches of a set's own pictures: nothing is downloaded, and nothing is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, conv2d

SIDE, STRIDE, GRID = 6, 2, 2
PATCHES = 20_000
"""Patches that means and covariances are taken over."""
CONTRAST, WHITENING, THRESHOLD = 10.0, 0.1, 0.25
OF_A_FILTER = 2 * GRID * GRID
"""Features that each filter makes."""


class PatchFeatures(nn.Module):
    r"""Responses to whitened patches of pictures, pooled over the quarters of a picture.

    A patch p of 6 x 6 px is normalised, :math:`\hat p = (p - \bar p) / \sqrt{\mathrm{var}(p) + 10}`, and whitened,
    :math:`W (\hat p - \mu)` with :math:`W = (\mathrm{cov}(\hat p) + 0.1)^{-1/2}`. K of them, drawn at random and scaled
    to length one, are filters d; a picture's features are the means over each quarter of
    :math:`\max(0, \pm d \cdot W(\hat p - \mu) - 1/4)` over its patches, every second one in both directions.

    Args:
        pictures: uint8 [N, 3, S, S] to draw patches from, S >= 8.
        filters: K; `num_features` is 8 K.
        seed: of the draws.

    Source: Coates and Ng, "The Importance of Encoding Versus Training with Sparse Coding and Vector Quantization"
    (2011), random patches with a soft threshold; constants of Coates, Ng and Lee (2011).
    """

    def __init__(self, pictures: Tensor, filters: int = 128, *, seed: int = 0) -> None:
        super().__init__()
        self.num_features = OF_A_FILTER * filters
        patches = _normalised(_drawn(pictures, max(PATCHES, filters), seed))
        mean = patches.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(patches.T))
        whitening = vectors @ torch.diag((values.clamp(min=0) + WHITENING).rsqrt()) @ vectors.T
        chosen = (patches[:filters] - mean) @ whitening
        directions = chosen / chosen.norm(dim=1, keepdim=True).clamp(min=1e-6)
        # Filters of patches that are normalised and not yet whitened: whitening is its own transpose.
        weight = directions @ whitening
        self.register_buffer("weight", weight.float())
        self.register_buffer("offset", (weight @ mean).float())

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """Features [N, num_features] of pictures [N, 3, S, S] of values 0 to 255."""
        x = pictures.float()
        count = 3 * SIDE * SIDE
        mean, square = (avg_pool2d(values, SIDE, STRIDE).mean(1, keepdim=True) for values in (x, x * x))
        spread = ((square - mean * mean).clamp(min=0) * count / (count - 1) + CONTRAST).sqrt()
        weight, offset = self.get_buffer("weight"), self.get_buffer("offset")
        responses = conv2d(x, weight.view(-1, 3, SIDE, SIDE), stride=STRIDE)
        responses = (responses - weight.sum(1)[:, None, None] * mean) / spread - offset[:, None, None]
        both = torch.cat([(responses - THRESHOLD).clamp(min=0), (-responses - THRESHOLD).clamp(min=0)], dim=1)
        return adaptive_avg_pool2d(both, GRID).flatten(1)


def _drawn(pictures: Tensor, count: int, seed: int) -> Tensor:
    """Patches at random places, float64 [count, 3 * SIDE * SIDE]."""
    generator = torch.Generator().manual_seed(seed)
    picture = torch.randint(len(pictures), (count,), generator=generator)
    top, left = torch.randint(pictures.shape[-1] - SIDE + 1, (2, count), generator=generator)
    windows = pictures.unfold(2, SIDE, 1).unfold(3, SIDE, 1)
    return windows[picture, :, top, left].flatten(1).double()


def _normalised(patches: Tensor) -> Tensor:
    return (patches - patches.mean(1, keepdim=True)) / (patches.var(1, keepdim=True) + CONTRAST).sqrt()
