"""Weights made elsewhere that the pretext stage starts from."""

from ...experiment.folder.paths import user_path
from ...vision.networks.backbones import build_backbone
from ...vision.networks.foreign_weights import load_backbone
from ...vision.networks.weight_files import ForeignWeights, read_weights
from ..settings.sections import ModelConfig


def initial_weights(model: ModelConfig) -> ForeignWeights | None:
    """The weights that model.init_backbone names, or None.

    Raises:
        ConfigError, ArtifactError: they cannot be read.
    """
    return None if model.init_backbone is None else read_weights(user_path(model.init_backbone))


def check_initial_weights(model: ModelConfig, image_size: int) -> None:
    """Load the initial weights once, if there are any, so that a misfit is found before anything is written.

    Raises:
        ConfigError, ArtifactError: they cannot be read, or do not fit the backbone.
    """
    weights = initial_weights(model)
    if weights is not None:
        load_backbone(weights, build_backbone(model.backbone, image_size=image_size), model.backbone)
