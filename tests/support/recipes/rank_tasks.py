"""Tasks that behave otherwise on one rank than on the others."""

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.distributed import rank
from recipes.bissl.tasks.classification import Classification
from recipes.bissl.tasks.simclr import SimCLR


class BrokenOnOneRank(SimCLR):  # type: ignore[misc]
    """The first view of rank 1's third batch is NaN."""

    def transform(self) -> Callable[..., Any]:
        views: Callable[..., Any] = super().transform()
        numbers = itertools.count(1)

        def broken(images: Tensor, generator: torch.Generator, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
            first, second = views(images, generator, rows=rows)
            if next(numbers) == 3 and rank() == 1:
                first = first * math.nan
            return first, second

        return broken


class FailingOnOneRank(SimCLR):  # type: ignore[misc]
    """Rank 1 cannot draw its third batch."""

    def transform(self) -> Callable[..., Any]:
        views: Callable[..., Any] = super().transform()
        numbers = itertools.count(1)

        def failing(images: Tensor, generator: torch.Generator, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
            if next(numbers) == 3 and rank() == 1:
                raise OSError(5, "Input/output error", "images.bin")
            return views(images, generator, rows=rows)

        return failing


class SlowOnOneRank(SimCLR):  # type: ignore[misc]
    """Rank 0 cannot draw its third batch, while rank 1 takes its time over its own."""

    def transform(self) -> Callable[..., Any]:
        views: Callable[..., Any] = super().transform()
        numbers = itertools.count(1)

        def failing(images: Tensor, generator: torch.Generator, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
            if next(numbers) == 3:
                if rank() == 0:
                    raise OSError(28, "No space left on device")
                time.sleep(9.0)
            return views(images, generator, rows=rows)

        return failing


class Dropping(Classification):  # type: ignore[misc]
    """A head with dropout."""

    def build(self, backbone: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Dropout(0.3), super().build(backbone))


class OwnNorm(nn.BatchNorm1d):
    """A BatchNorm of a kind of its own."""


class OwnlyNormed(Classification):  # type: ignore[misc]
    """A head with such a layer."""

    def build(self, backbone: nn.Module) -> nn.Module:
        return nn.Sequential(OwnNorm(int(backbone.num_features)), super().build(backbone))  # type: ignore[arg-type]
