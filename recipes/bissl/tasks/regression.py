"""Regression of one or more numbers from an image."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ...vision.errors import DataError
from ...vision.imagesets import LabelKind
from ...vision.metrics import Metric, mean_absolute_error, r_squared
from .base import Bound
from .linear import LinearTask

_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": nn.functional.mse_loss,
    "smooth_l1": nn.functional.smooth_l1_loss,
    "l1": nn.functional.l1_loss,
}


@final
class Regression(LinearTask):
    """A linear layer with one output a target; targets are float32 [N, T]; mean absolute error and R^2.

    With z the linear layer, outputs are in the targets' own units, the loss in units of `target_std`, its mean over
    examples and targets::

        o = target_mean + target_std * z,      loss = mean of l( (o - y) / target_std )

    Without these two options nothing is scaled. Targets far from 0 and 1 in mean and deviation need them: the layer
    starts near 0, and the learning rates of the presets are for outputs of about 1.
    """

    labels: ClassVar[LabelKind] = "regression"

    loss_function: Literal["mse", "smooth_l1", "l1"] = Field(
        default="mse", description="squared error, Huber's with its bend at 1, or absolute error; of scaled targets"
    )
    target_mean: tuple[float, ...] | None = Field(
        default=None, description="typical value of each target (its unit), for example the training mean; null: 0"
    )
    target_std: tuple[float, ...] | None = Field(
        default=None, description="typical deviation of each target (its unit), above 0; null: 1"
    )

    @model_validator(mode="after")
    def _scales(self) -> Self:
        if self.target_std is not None and not all(value > 0 for value in self.target_std):
            raise ValueError(f"target_std must be above 0 for every target, got {self.target_std}")
        return self

    def build(self, backbone: nn.Module) -> nn.Module:
        """As every linear task.

        Raises:
            DataError: target_mean or target_std has another number of values than the data have targets.
        """
        for name, values in (("target_mean", self.target_mean), ("target_std", self.target_std)):
            if values is not None and len(values) != len(self.classes):
                raise DataError(
                    f"downstream.options.{name}: has {len(values)} values, but the data have {len(self.classes)} "
                    f"targets ({', '.join(self.classes)}); give one for each"
                )
        return super().build(backbone)

    def forward(self, backbone: Bound, head: Bound, inputs: Tensor) -> Tensor:
        outputs = head(backbone(inputs))
        return outputs * _like(outputs, self.target_std, 1.0) + _like(outputs, self.target_mean, 0.0)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        scale = _like(outputs, self.target_std, 1.0)
        return _LOSSES[self.loss_function](outputs / scale, targets / scale)

    def metrics(self) -> dict[str, Metric]:
        return {"mae": mean_absolute_error(), "r2": r_squared()}

    def describe(self) -> list[str]:
        scaled = self.target_mean is not None or self.target_std is not None
        units = "of targets scaled by the given mean and deviation" if scaled else "of targets as they are"
        names = {"mse": "squared error", "smooth_l1": "smooth absolute error", "l1": "absolute error"}
        return [f"downstream loss: {names[self.loss_function]} {units}; mae is in the targets' units, r2 at most 1"]


def _like(outputs: Tensor, values: tuple[float, ...] | None, default: float) -> Any:
    """One value a target on the outputs' device, in float32 or better; a number where there are none."""
    if values is None:
        return default
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    # Made there, since a copy from the host would be waited for.
    return torch.stack([torch.full((), value, dtype=dtype, device=outputs.device) for value in values])
