"""What the bundled downstream tasks share: views of an image and a linear layer on its pooled features."""

from typing import Any, Self

from pydantic import Field, model_validator
from torch import nn

from ...vision.networks.backbones import linear_head
from ...vision.views.evaluation_view import EvalView
from ...vision.views.view_policy import ViewPolicy
from .base import DownstreamTask


class LinearTask(DownstreamTask):
    """One output a class through a linear layer (paper, section 4.1). A task gives `loss` and `metrics`."""

    view: ViewPolicy = Field(
        description="distribution of a training view; size defaults to image_size, interpolation to bilinear"
    )
    eval_resize: int | None = Field(
        default=None, ge=1, description="resize the shorter side before the centre crop (px); null: image_size, no crop"
    )

    @model_validator(mode="before")
    @classmethod
    def _size(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        no_colour = {"jitter_probability": 0.0, "grey_probability": 0.0}
        view = data.get("view", no_colour)
        # Labelled crops are bilinear in VICReg's fine-tuning and in the authors' code, those of the pretext bicubic.
        defaults = {"size": data.get("image_size"), "interpolation": "bilinear"}
        view = {**defaults, **view} if isinstance(view, dict) else view
        return {**data, "view": view}

    @model_validator(mode="after")
    def _crop_fits(self) -> Self:
        if self.eval_resize is not None and self.eval_resize < self.image_size:
            raise ValueError(f"eval_resize={self.eval_resize} px is smaller than the crop of {self.image_size} px")
        return self

    def build(self, backbone: nn.Module) -> nn.Module:
        return linear_head(int(backbone.num_features), len(self.classes))  # type: ignore[arg-type]

    def train_view(self) -> ViewPolicy:
        return self.view

    def evaluation_view(self) -> EvalView:
        return EvalView(self.eval_resize or self.image_size, self.image_size, self.view.mean, self.view.std)
