"""A random view of every picture of a batch in memory, drawn and made in one call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.vision.views.batched_views import checked_images, views_of_pictures
from recipes.vision.views.view_policy import ViewPolicy, draw


@dataclass(frozen=True)
class RandomView:
    """``RandomView(policy)(pictures, generator)``: drawn and made, a batch at a time, where the pictures lie."""

    policy: ViewPolicy

    def __call__(self, pictures: Tensor, generator: torch.Generator) -> Tensor:
        """Views of uint8 `pictures` [N, 1 or 3, H, W]: float32 [N, 3, size, size] on their device; see
        `views_of_pictures`. `generator` is a CPU one. Raises ValueError on another type or shape."""
        return views_of_pictures(self.policy, pictures, draw(self.policy, len(checked_images(pictures)), generator))
