"""Tasks that behave otherwise on one rank than on the others."""

import itertools
import math
import multiprocessing
import time
from collections.abc import Iterator

import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from bilevel.distributed import rank
from recipes.bissl.tasks.classification import Classification
from recipes.bissl.tasks.simclr import SimCLR

Views = tuple[Tensor, Tensor]


class Counting(SimCLR):  # type: ignore[misc]
    """Knows which of its batches comes next."""

    _numbers: Iterator[int] = PrivateAttr(default_factory=lambda: itertools.count(1))

    def number(self) -> int:
        """1 for the first batch."""
        return next(self._numbers)


class BrokenOnOneRank(Counting):
    """The first view of rank 1's third batch is NaN."""

    def transform(self, images: Views, generator: torch.Generator, *, rows: slice, count: int) -> Views:
        first, second = images
        return first * math.nan if self.number() == 3 and rank() == 1 else first, second


class FailingOnOneRank(Counting):
    """Rank 1 cannot draw its third batch."""

    def transform(self, images: Views, generator: torch.Generator, *, rows: slice, count: int) -> Views:
        if self.number() == 3 and rank() == 1:
            raise OSError(5, "Input/output error", "images.bin")
        return images


class SlowOnOneRank(Counting):
    """Rank 0 cannot draw its third batch, while rank 1 takes its time over its own."""

    def transform(self, images: Views, generator: torch.Generator, *, rows: slice, count: int) -> Views:
        if self.number() == 3:
            if rank() == 0:
                raise OSError(28, "No space left on device")
            time.sleep(9.0)
        return images


class LosingAWorker(Counting):
    """Rank 1 loses one of its worker processes after its third batch."""

    def transform(self, images: Views, generator: torch.Generator, *, rows: slice, count: int) -> Views:
        if self.number() == 3 and rank() == 1:
            multiprocessing.active_children()[0].kill()
        return images


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
