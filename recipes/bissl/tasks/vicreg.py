"""VICReg (Bardes et al. 2022): invariance between two views, without negatives or a target network."""

from collections.abc import Mapping
from typing import final

from pydantic import Field
from torch import Tensor, nn

from ...vision.losses import vicreg
from .base import Bound
from .two_views import TwoViewTask


@final
class VICReg(TwoViewTask):
    """VICReg's loss between two random views through an expander, here the head "projector".

    The source's expander has the widths (8192, 8192, 8192); the default is the one that all bundled tasks share.
    """

    invariance: float = Field(default=25.0, ge=0, description="weight of the mean squared difference of the views")
    variance: float = Field(default=25.0, ge=0, description="weight of the hinge on each dimension's deviation")
    covariance: float = Field(default=1.0, ge=0, description="weight of the squared covariances between dimensions")

    def build(self, backbone: nn.Module) -> nn.ModuleDict:
        return nn.ModuleDict({"projector": self.fresh_projector(backbone)})

    def outputs(self, backbone: Bound, heads: Mapping[str, Bound], batch: tuple[Tensor, Tensor]) -> Tensor:
        """Expanded embeddings of both views, [n, 2, d]."""
        return self.both(lambda view: heads["projector"](backbone(view)), batch)

    def output_loss(self, outputs: Tensor) -> Tensor:
        weights = {"invariance": self.invariance, "variance": self.variance, "covariance": self.covariance}
        return vicreg(outputs[:, 0], outputs[:, 1], **weights)

    def describe(self) -> list[str]:
        terms = f"invariance {self.invariance:g}, variance {self.variance:g}, covariance {self.covariance:g}"
        return [f"VICReg: weights of the terms: {terms}"]
