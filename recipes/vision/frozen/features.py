"""A whole set in one fixed view, and features of it by a network that nothing trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from ...experiment.errors import ConfigError
from ...experiment.folder.paths import user_path
from ...experiment.terminal import counted
from ..imagesets import ImageSet
from ..networks.backbones import Backbone, build_backbone
from ..networks.foreign_weights import load_backbone
from ..networks.weight_files import read_weights
from ..pipeline.loader import Loader, UnderWay
from ..pipeline.reduction import View
from ..pipeline.stream import InOrder
from ..pipeline.workers import Workers, cores_to_spare, share_of_budget
from ..views.evaluation_view import EvalView, eval_resize
from .patches import OF_A_FILTER, PatchFeatures
from .section import FrozenSection

SAMPLE = 2_000
"""Pictures that patches are drawn from."""


@dataclass(frozen=True)
class Reading:
    """How a set is gone through.

    Attributes:
        batch_size: pictures a pass.
        num_workers: processes that read streamed pictures; None: one fewer than there are cores.
        device: where networks compute.
    """

    batch_size: int
    num_workers: int | None
    device: torch.device


@dataclass(frozen=True)
class FrozenFeatures:
    """Features by a `FrozenSection` without an open choice.

    Attributes:
        section: which features.
        widest: numbers a picture at most.

    Raises:
        ConfigError, ArtifactError: weights of a backbone that cannot be read or do not fit, or features too wide.
    """

    section: FrozenSection
    widest: int

    @cached_property
    def backbone(self) -> tuple[Backbone, str] | None:
        """The network, and a digest of the weights that it is given ("" for random ones); None for other features."""
        section = self.section
        if section.backbone is None:
            return None
        given = None if section.init_backbone is None else user_path(section.init_backbone)
        assert section.image_size is not None, "settled"
        backbone, digest = frozen_backbone(section.backbone, section.image_size, given)
        self._check_width(backbone.num_features, f"model.backbone: {section.backbone}", "name a narrower network")
        return backbone, digest

    @property
    def decisive(self) -> list[object]:
        """What decides them besides the pictures, as JSON values."""
        of_backbone = None if self.backbone is None else self.backbone[1]
        section = self.section
        filters = section.filters if section.features == "patches" else None
        return [section.features, section.image_size, filters, section.backbone, of_backbone]

    def check(self, images: ImageSet) -> None:
        """Refuse features that are too wide, by the first of the pictures; colours that come later are left to `of`."""
        if self.section.features == "patches":
            filters = self.section.filters
            self._check_width(OF_A_FILTER * filters, f"model.filters: a picture seen by {filters:,}", "take fewer")
        elif self.backbone is None:
            self.of([images.subset([0])], 0, torch.device("cpu"))

    def of(self, sets: Sequence[ImageSet], num_workers: int | None, device: torch.device) -> Tensor:
        """Those of all pictures, one set behind the other, float32 [N, D] on the CPU; patches are of the first set.

        Raises:
            ConfigError: they are too wide, or a network makes NaN or infinity of a picture.
        """
        side = self.section.image_size
        assert side is not None, "settled"
        reading = Reading(self.section.batch_size, num_workers, device)
        if self.section.features == "pixels":
            found = _pixels(sets, side, reading)
            self._check_width(found.shape[1], f"model.image_size: a picture of {side} px", "make it smaller")
        elif self.backbone is not None:
            view = EvalView(eval_resize(side), side)
            found = torch.cat([encoded(self.backbone[0], one, view, reading) for one in sets])
            wrong = int((~found.isfinite()).any(1).sum())
            if wrong:
                raise ConfigError(
                    f"model.backbone: {self.section.backbone} makes NaN or infinity of {counted(wrong, 'picture')} out "
                    f"of {len(found):,}; give it other weights (model.init_backbone), or another network"
                )
        else:
            chosen = torch.linspace(0, len(sets[0]) - 1, min(SAMPLE, len(sets[0]))).round().long()
            drawn = torch.cat(list(in_one_view(sets[0].subset(chosen), side, reading)))
            network = PatchFeatures(drawn, self.section.filters)
            found = torch.cat([encoded(network, one, side, reading) for one in sets])
        return found

    def _check_width(self, width: int, what: str, remedy: str) -> None:
        if width > self.widest:
            raise ConfigError(f"{what} has {width:,} features, and at most {self.widest:,} can be used; {remedy}")


def in_one_view(images: ImageSet, view: View, reading: Reading) -> Iterator[Tensor]:
    """The pictures in order, a batch at a time, as the view makes them, [n, 3, side, side]."""
    count = cores_to_spare() if reading.num_workers is None else reading.num_workers
    workers = Workers(count, share_of_budget())
    loader = Loader(images.images, (view,), workers)

    def finish(begun: UnderWay) -> Tensor:
        return loader.finish(begun)[0][0].expand(-1, 3, -1, -1)

    try:
        yield from InOrder(len(images), reading.batch_size, loader.begin, finish, loader.give_up)
    finally:
        workers.close()


def _pixels(sets: Sequence[ImageSet], side: int, reading: Reading) -> Tensor:
    """The pictures themselves, of 0 to 255: side^2 numbers where all are grey, else 3 side^2."""
    found = torch.cat([batch.float() for one in sets for batch in in_one_view(one, side, reading)])
    grey = bool((found == found[:, :1]).all())
    return (found[:, :1] if grey else found).flatten(1)


@torch.no_grad()
def encoded(network: nn.Module, images: ImageSet, view: View, reading: Reading) -> Tensor:
    """What the network, in evaluation mode and on its device afterwards, makes of a set: float32 [N, D] on the CPU."""
    network.to(reading.device).eval()
    return torch.cat([network(batch.to(reading.device)).float().cpu() for batch in in_one_view(images, view, reading)])


def frozen_backbone(name: str, image_size: int, weights: Path | None) -> tuple[Backbone, str]:
    """A backbone of given weights, and their digest; without weights, random ones that are always the same, and "".

    Raises:
        ConfigError, ArtifactError: weights that cannot be read or do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = build_backbone(name, image_size=image_size)
    if weights is None:
        return backbone, ""
    found = read_weights(weights)
    load_backbone(found, backbone, name)
    return backbone, found.sha256
