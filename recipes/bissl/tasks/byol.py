"""BYOL (Grill et al. 2020): predict a slowly moving target network's view of the same image."""

import copy
from collections.abc import Mapping
from typing import final

import torch
from pydantic import Field
from torch import Tensor, nn

from ...vision.losses import cosine_distance
from ...vision.networks.backbones import projector
from .base import Bound
from .two_views import TwoViewTask


@final
class BYOL(TwoViewTask):
    """Distance of predictions from one view to a target network's projections of the other, both ways round.

    With p_i the online network's (backbone, projector, predictor) unit-length outputs for view i, t_i the target's
    (backbone, projector), which are constants::

        loss = mean over samples of  || p_1 - t_2 ||^2 + || p_2 - t_1 ||^2

    After every optimizer step on the task, in the bilevel stage's lower level too and never otherwise, the target's
    parameters follow: ``target <- decay * target + (1 - decay) * online``. The target is the head "target", a copy of
    backbone and projector without gradients, equal to them at the start, and again after a projector was fitted to
    given weights first; it is saved and loaded with the heads. Its running statistics are those of its own forward
    passes.

    The predictor has the projector's shape. The source has one hidden layer of 4096 and an output of 256 in both, and
    raises the decay to 1 over the training; here it is constant.

    Source: Grill et al., "Bootstrap Your Own Latent" (2020), section 3.1 and equation 2.
    """

    target_decay: float = Field(
        default=0.9995, ge=0, le=1, description="share of itself that the target keeps at every step"
    )

    def build(self, backbone: nn.Module) -> nn.ModuleDict:
        projection = self.fresh_projector(backbone)
        predictor = projector(self.projector_widths[-1], self.projector_widths, last_bias=self.projector_last_bias)
        target = copy.deepcopy(nn.Sequential(backbone, projection)).requires_grad_(False).train()
        return nn.ModuleDict({"projector": projection, "predictor": predictor, "target": target})

    def outputs(self, backbone: Bound, heads: Mapping[str, Bound], batch: tuple[Tensor, Tensor]) -> Tensor:
        """Predictions of both views, then the target's projections of both, [n, 4, d]."""
        predictions = self.both(lambda view: heads["predictor"](heads["projector"](backbone(view))), batch)
        with torch.no_grad():
            targets = self.both(heads["target"], batch)
        return torch.cat([predictions, targets], dim=1)

    def output_loss(self, outputs: Tensor) -> Tensor:
        first, second, first_target, second_target = outputs.unbind(1)
        return cosine_distance(first, second_target) + cosine_distance(second, first_target)

    @torch.no_grad()
    def after_step(self, backbone: nn.Module, heads: nn.ModuleDict, step: int) -> None:
        online = nn.Sequential(backbone, heads["projector"])
        for slow, fast in zip(heads["target"].parameters(), online.parameters(), strict=True):
            slow.lerp_(fast, 1 - self.target_decay)

    @torch.no_grad()
    def after_fitting(self, backbone: nn.Module, heads: nn.ModuleDict) -> None:
        heads["target"].load_state_dict(nn.Sequential(backbone, heads["projector"]).state_dict())

    def describe(self) -> list[str]:
        decay = f"the target network keeps {self.target_decay:g} of itself at every pretext step"
        return [f"BYOL: {decay}, of the bilevel stage too, and stands still in upper steps"]
