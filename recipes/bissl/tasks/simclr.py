"""SimCLR (Chen et al. 2020), the paper's pretext task."""

from collections.abc import Mapping
from typing import final

from pydantic import Field
from torch import Tensor, nn

from ...vision.losses import nt_xent
from .base import Bound
from .two_views import TwoViewTask


@final
class SimCLR(TwoViewTask):
    """NT-Xent between two random views through a three-layer projector (paper, section 4.1 and appendix B.1)."""

    temperature: float = Field(default=0.5, gt=0, description="NT-Xent temperature")

    def build(self, backbone: nn.Module) -> nn.ModuleDict:
        return nn.ModuleDict({"projector": self.fresh_projector(backbone)})

    def outputs(self, backbone: Bound, heads: Mapping[str, Bound], batch: tuple[Tensor, Tensor]) -> Tensor:
        """Projections of both views, [n, 2, d]."""
        return self.both(lambda view: heads["projector"](backbone(view)), batch)

    def output_loss(self, outputs: Tensor) -> Tensor:
        return nt_xent(outputs[:, 0], outputs[:, 1], temperature=self.temperature)
