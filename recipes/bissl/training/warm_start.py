"""The pretext stage's start from weights made elsewhere: the backbone's, and heads that fit it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from ...vision.networks.backbones import build_backbone
from ...vision.networks.foreign_weights import ForeignWeights, load_backbone, read_weights
from ...vision.optimizers import schedule
from ..settings.sections import ModelConfig, PretextConfig
from ..tasks.base import PretextTask
from .compute import Computing
from .global_loss import pretext_loss
from .loop import optimizer_step


def initial_weights(model: ModelConfig) -> ForeignWeights | None:
    """The weights that model.init_backbone names, or None.

    Raises:
        ConfigError, ArtifactError: they cannot be read.
    """
    return None if model.init_backbone is None else read_weights(Path(model.init_backbone))


def check_initial_weights(model: ModelConfig, image_size: int) -> None:
    """Load the initial weights once, if there are any, so that a misfit is found before anything is written.

    Raises:
        ConfigError, ArtifactError: they cannot be read, or do not fit the backbone.
    """
    weights = initial_weights(model)
    if weights is not None:
        load_backbone(weights, build_backbone(model.backbone, image_size=image_size), model.backbone)


class HeadsFirst:
    """Updates on the pretext loss: the first `steps` fit the heads to the frozen backbone, later ones are `then`.

    The frozen backbone is in eval mode and keeps every weight and buffer; heads before it (a masked autoencoder's
    token) get gradients through it. The heads have an optimizer of their own: the
    task's, with the pretext stage's learning rate, warmed up over a tenth of the steps and then decayed by a cosine.
    """

    def __init__(
        self,
        steps: int,
        section: PretextConfig,
        computing: Computing,
        task: PretextTask,
        backbone: nn.Module,
        heads: nn.ModuleDict,
        then: Callable[[Any], dict[str, Any]],
    ) -> None:
        self.steps, self.made, self.then = steps, 0, then
        self.task, self.backbone, self.heads = task, backbone, heads
        trained = [parameter for parameter in heads.parameters() if parameter.requires_grad]
        self.optimizer = task.optimizer(trained, section.lr, section.weight_decay)
        self.scheduler = schedule(self.optimizer, total_steps=steps, warmup_steps=steps // 10)

        constants = {name: parameter.detach() for name, parameter in backbone.named_parameters()}

        def frozen(x: Tensor, feature_map: bool = False) -> Tensor:
            return functional_call(backbone, constants, (x,), {"feature_map": feature_map})

        self.loss = computing.first_order(lambda batch: pretext_loss(task, frozen, dict(heads.items()), batch))

    def __call__(self, batch: Any) -> dict[str, Any]:
        """One update; its event."""
        self.made += 1
        fitting = self.made <= self.steps
        self.backbone.train(not fitting)
        if not fitting:
            return self.then(batch)
        record = optimizer_step(self.loss(batch), self.optimizer, self.scheduler)
        if self.made == self.steps:
            self.task.after_fitting(self.backbone, self.heads)
        return record

    def state_dict(self) -> dict[str, Any]:
        optimizer, scheduler = self.optimizer.state_dict(), self.scheduler.state_dict()
        return {"made": self.made, "optimizer": optimizer, "scheduler": scheduler}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.made = state["made"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
