"""What the pretext tasks on two random views of an image share."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ...vision.networks.backbones import projector
from ...vision.views.view_policy import ViewPolicy
from .base import Bound, PretextTask


class TwoViewTask(PretextTask):
    """A loss of the embeddings of two random views, made by a backbone and the head "projector".

    A task gives `build` (with that head among the heads), `outputs` and `output_loss`. The views are those of VICReg
    (Bardes et al. 2022) unless options say otherwise.
    """

    projector_widths: tuple[int, ...] = Field(
        default=(256, 256, 256), description="output widths of the projector's layers"
    )
    projector_last_bias: bool = Field(default=True, description="whether the projector's last layer has a bias")
    joint_pass: bool = Field(
        default=False,
        description="both views in one forward pass (joint BatchNorm statistics) instead of one pass a view",
    )
    view1: ViewPolicy = Field(description="distribution of the first view; size defaults to image_size")
    view2: ViewPolicy = Field(description="distribution of the second view; size defaults to image_size")

    @model_validator(mode="before")
    @classmethod
    def _sizes(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        vicreg = {"view1": {"blur_probability": 1.0}, "view2": {"blur_probability": 0.1, "solarize_probability": 0.2}}
        return {**data, **{name: _sized(data.get(name, default), data) for name, default in vicreg.items()}}

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.joint_pass and self.view1.size != self.view2.size:
            raise ValueError(
                f"joint_pass needs views of one size, got {self.view1.size} and {self.view2.size} px; set it to false"
            )
        return self

    def random_views(self) -> tuple[ViewPolicy, ViewPolicy]:
        return self.view1, self.view2

    def loss(self, backbone: Bound, heads: Mapping[str, Bound], batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.output_loss(self.outputs(backbone, heads, batch))

    @abstractmethod
    def outputs(self, backbone: Bound, heads: Mapping[str, Bound], batch: tuple[Tensor, Tensor]) -> Tensor: ...

    @abstractmethod
    def output_loss(self, outputs: Tensor) -> Tensor: ...

    def embed(self, backbone: Bound, heads: Mapping[str, Bound], batch: tuple[Tensor, Tensor]) -> Tensor:
        return heads["projector"](backbone(batch[0]))

    def fresh_projector(self, backbone: nn.Module) -> nn.Sequential:
        """The head "projector" for this backbone."""
        features = int(backbone.num_features)  # type: ignore[arg-type]
        return projector(features, self.projector_widths, last_bias=self.projector_last_bias)

    def both(self, network: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        """Both views through a network, in the forward passes that `joint_pass` asks for: [n, 2, d]."""
        if self.joint_pass:
            return torch.stack(network(torch.cat(batch)).chunk(2), dim=1)
        return torch.stack([network(view) for view in batch], dim=1)


def _sized(view: Any, options: dict[str, Any]) -> Any:
    return {"size": options.get("image_size"), **view} if isinstance(view, dict) else view
