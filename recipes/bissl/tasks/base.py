"""The two interfaces through which the stages see a task.

A task is one class with typed options. It is named on the command line or in a config file as ``module:Class`` (bundled
ones by a short name) and its options are checked when the config is. Nothing in the stages knows a task by name.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from ...vision.imagesets import LabelKind
from ...vision.metrics import Metric
from ...vision.optimizers import LARS
from ...vision.views.evaluation_view import EvalView
from ...vision.views.view_policy import ViewPolicy

if TYPE_CHECKING:
    import torchmetrics

Bound = Callable[..., Any]
"""A module bound to some parameters: call it as the module itself."""


class Task(BaseModel):
    """What both kinds of tasks share: options that are fields, checked by pydantic; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    image_size: int = Field(ge=1, description="side of the square input (px); filled in from data.image_size")

    @abstractmethod
    def view_sizes(self) -> set[int]:
        """Sides of the images that the backbone is given (px); some backbones take one size alone."""

    def describe(self) -> list[str]:
        """Sentences for the report on choices of the task that a reader of the results must know."""
        return []

    @abstractmethod
    def describe_views(self) -> list[str]:
        """Sentences for the report on what becomes of an image before the task sees it."""

    def _working_size(self, what: str) -> str:
        return f"{what}: images at a working size of {self.image_size} px (central squares): the task declares no view"


class PretextTask(Task, ABC):
    """L_P(theta_P, phi_P): a self-supervised objective on unlabelled images."""

    stops_gradients: ClassVar[bool] = False
    """Whether the loss detaches a part that depends on its parameters, and means it (SimSiam): second derivatives are
    then not examined for what that cuts off (`bilevel.Problem.check_curvature`)."""

    lars_excludes_1d: bool = Field(
        default=True, description="LARS neither scales nor decays biases and norms; of no effect on another optimizer"
    )

    @abstractmethod
    def build(self, backbone: nn.Module) -> nn.ModuleDict:
        """Fresh heads phi_P for a backbone with `num_features` pooled features; seeded by torch's default generator."""

    def random_views(self) -> tuple[ViewPolicy, ...]:
        """The random views of every image that a batch is made of; sizes may differ.

        They are cut from the original image, by worker processes where images are files, and finished on the compute
        device. Without any, `transform` is given the images themselves, as central squares of `image_size` px.
        """
        return ()

    @model_validator(mode="after")
    def _views_are_several(self) -> Self:
        views = self.random_views()
        if not isinstance(views, tuple) or not all(isinstance(view, ViewPolicy) for view in views):
            raise ValueError(f"random_views must return a tuple of ViewPolicy, such as (view,), got {views!r:.80}")
        return self

    def view_sizes(self) -> set[int]:
        return {view.size for view in self.random_views()} or {self.image_size}

    def describe_views(self) -> list[str]:
        views = self.random_views()
        declared = [f"pretext view {number}: {view.describe_crop()}" for number, view in enumerate(views, 1)]
        return declared or [self._working_size("pretext")]

    def transform(self, images: Any, generator: torch.Generator) -> Any:
        """The batch, on the compute device; everything random in it that is no view is drawn here.

        Args:
            images: the tuple of `random_views`, float32 [N, 3, size, size] each, normalised; or, without any, the
                images, uint8 [N, 1 or 3, image_size, image_size].
            generator: of the CPU, seeded by the batch's place alone.

        Returns:
            A tensor or nested tuples, lists and dicts of tensors; `images` as they are by default. Masks of a masked
            autoencoder belong in it: they then travel with the stored batch and stay fixed within one linear solve.

        Over several processes every one is given the whole batch, whose tensors must then have N rows, and keeps its
        share of them. A transform with two more keywords, ``rows: slice`` and ``count: int``, is given its own rows
        alone: it draws for all `count` images in the same order, and uses what it has drawn for `rows`.
        """
        return images

    @abstractmethod
    def loss(self, backbone: Bound, heads: Mapping[str, Bound], batch: Any) -> Tensor:
        """The mean loss on a batch, 0-d. `backbone` and `heads` are bound to the parameters in question."""

    def outputs(self, backbone: Bound, heads: Mapping[str, Bound], batch: Any) -> Tensor:
        """Outputs [n, ...] with ``loss = output_loss(outputs)``, row i made from sample i; for micro-batching."""
        raise TypeError(
            f"{type(self).__name__} does not define outputs, which micro-batching and GaussNewton need; define outputs "
            "and output_loss in the task, or switch micro-batching off"
        )

    def output_loss(self, outputs: Tensor) -> Tensor:
        """The loss as a function of `outputs`, the only place where samples meet; 0-d."""
        raise TypeError(f"{type(self).__name__} defines outputs but not output_loss; define both")

    def embed(self, backbone: Bound, heads: Mapping[str, Bound], batch: Any) -> Tensor | None:
        """Embeddings [N, d] whose spread shows a collapse; None where the notion does not apply."""
        return None

    def after_step(self, backbone: nn.Module, heads: nn.ModuleDict, step: int) -> None:
        """Called after every optimizer step on this task, for example to move a momentum target."""
        return None

    def after_fitting(self, backbone: nn.Module, heads: nn.ModuleDict) -> None:
        """Called once after heads were fitted to given weights, for example to bring copies of them up to date."""
        return None

    def optimizer(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """The optimizer of pretext steps and of the lower level; LARS (the paper's) unless a task wants another."""
        return LARS(list(parameters), lr=lr, weight_decay=weight_decay, exclude_1d=self.lars_excludes_1d)


class DownstreamTask(Task, ABC):
    """L_D(theta, phi_D): a supervised objective on labelled images.

    Attributes:
        labels: what it takes as labels: "single-label" is int64 [N], "multi-label" bool [N, classes], "regression"
            float32 [N, targets], "segmentation" uint8 [N, H, W] with 255 for pixels of no class; None is any.
    """

    labels: ClassVar[LabelKind | None] = None

    classes: tuple[str, ...] = Field(
        description="names of the classes, for a regression those of the targets; filled in from the data"
    )

    @abstractmethod
    def build(self, backbone: nn.Module) -> nn.Module:
        """A fresh head phi_D for a backbone with `num_features` pooled features."""

    def train_view(self) -> ViewPolicy | None:
        """The random view of a training image, as `PretextTask.random_views`; None: `transform` is given the image."""
        return None

    def evaluation_view(self) -> EvalView | None:
        """The view of an image in validation and test; None: `transform` is given the image."""
        return None

    def view_sizes(self) -> set[int]:
        train, evaluation = self.train_view(), self.evaluation_view()
        return {train.size if train else self.image_size, evaluation.crop if evaluation else self.image_size}

    def describe_views(self) -> list[str]:
        train, evaluation = self.train_view(), self.evaluation_view()
        names = "downstream training view", "downstream evaluation"
        return [
            self._working_size(names[0]) if train is None else f"{names[0]}: {train.describe_crop()}",
            self._working_size(names[1])
            if evaluation is None
            else f"{names[1]}: shorter side to {evaluation.resize} px, central {evaluation.crop} px",
        ]

    def transform(self, images: Tensor, targets: Any, generator: torch.Generator, train: bool) -> tuple[Any, Any]:
        """(inputs, targets) of a batch, on the compute device; unchanged by default.

        Args:
            images: the declared view, float32 [N, 3, size, size], normalised; or, without one, the images, uint8
                [N, 1 or 3, image_size, image_size].
            targets: their labels. Masks have been cut and mirrored as the images were, nearest pixels, 255 where there
                is nothing.
            generator: as in `PretextTask.transform`; in an evaluation there is nothing to draw.

        Over several processes as in `PretextTask.transform`; in an evaluation each process is given its own rows.
        """
        return images, targets

    @abstractmethod
    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The mean loss on a batch, 0-d."""

    @abstractmethod
    def metrics(self) -> "Mapping[str, Metric | torchmetrics.Metric]":
        """Metrics by name; the first is the primary one, by which the best epoch is chosen.

        Besides those of `bilevel.recipes.vision.metrics`, any ``torchmetrics.Metric`` that gives one number and says
        whether higher is better; see `bilevel.recipes.vision.torch_metrics.as_metrics`.
        """

    def forward(self, backbone: Bound, head: Bound, inputs: Any) -> Any:
        """Outputs of the model; a task that needs the feature map calls ``backbone(inputs, feature_map=True)``."""
        return head(backbone(inputs))
