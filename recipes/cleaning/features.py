"""The stage that sees pictures: frozen features of all of them, once for all repeats."""

from typing import Any

import torch
from torch import Tensor, nn

from ..experiment.artifacts import Artifact, make_key
from ..experiment.errors import ConfigError
from ..experiment.folder.paths import user_path
from ..experiment.stage import Attempt, CachedStage, Tensors
from ..experiment.stage_training import Seconds
from ..experiment.workspace import Workspace
from ..vision.imagesets import ImageSet
from ..vision.networks.backbones import build_backbone
from ..vision.networks.foreign_weights import load_backbone
from ..vision.networks.patches import PatchFeatures
from ..vision.networks.weight_files import read_weights
from ..vision.pipeline.frozen import encoded, in_one_view
from ..vision.views.evaluation_view import EvalView, eval_resize
from .data import Pictures
from .settings import WIDEST, Config

STAGE = "features"
SAMPLE = 2_000
"""Pictures that patches are drawn from."""


def backbone_of(config: Config) -> tuple[nn.Module, str]:
    """The network that the features are of, and a digest of the weights that it is given ("" for random ones).

    Raises:
        ConfigError, ArtifactError: weights that cannot be read or do not fit, or features that are too wide.
    """
    name = config.model.backbone
    assert name is not None, "checked by the configuration"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = build_backbone(name, image_size=config.image_size)
    if backbone.num_features > WIDEST:
        raise ConfigError(
            f"model.backbone: {name} has {backbone.num_features} features a picture, and at most {WIDEST} can be "
            "solved for; name a narrower network"
        )
    if config.model.init_backbone is None:
        return backbone.eval(), ""
    weights = read_weights(user_path(config.model.init_backbone))
    load_backbone(weights, backbone, name)
    return backbone.eval(), weights.sha256


def run(config: Config, pictures: Pictures, device: torch.device, workspace: Workspace) -> Artifact:
    """The features of all pictures, float32 [N, D] as "all.features": centred, and of variance 1 on average."""
    kind, parts = config.features, pictures.parts
    made_from = [kind, config.image_size, config.model.backbone]
    if kind == "backbone":
        made_from.append(backbone_of(config)[1])

    def fit(attempt: Attempt) -> tuple[dict[str, nn.Module], dict[str, Any]]:
        seconds = Seconds()
        found = torch.cat([_encoded(config, images, pictures.data, device) for images in parts.values()])
        if found.shape[1] > WIDEST:
            raise ConfigError(
                f"data.image_size: pictures of {config.image_size} px have {found.shape[1]:,} pixels, and at most "
                f"{WIDEST} features can be solved for; make it smaller, or set model.features to patches"
            )
        centred = found - found.mean(0)
        scale = centred.square().mean().sqrt().clamp(min=1e-12)
        made = {"all": Tensors({"features": centred / scale})}
        return made, {"seconds": seconds.total(), "kind": kind, "width": found.shape[1]}

    key = make_key(STAGE, 0, None, made_from, list(parts), pictures.identity.labelled)
    return CachedStage(workspace.store, STAGE, key).run(fit)


def _encoded(config: Config, images: ImageSet, patches: ImageSet, device: torch.device) -> Tensor:
    """Features of one set, float32 [N, D] on the CPU; `patches` are of another one."""
    kind, side = config.features, config.image_size
    batches = {"batch_size": config.model.batch_size, "num_workers": config.data.num_workers}
    if kind == "pixels":
        pixels = torch.cat(list(in_one_view(images, side, **batches))).float()
        # Grey pictures have three channels of the same values.
        grey = bool((pixels == pixels[:, :1]).all())
        return (pixels[:, :1] if grey else pixels).flatten(1)
    if kind == "backbone":
        return encoded(backbone_of(config)[0], images, EvalView(eval_resize(side), side), device, **batches)
    chosen = torch.linspace(0, len(patches) - 1, min(SAMPLE, len(patches))).round().long()
    drawn = torch.cat(list(in_one_view(patches.subset(chosen), side, **batches)))
    return encoded(PatchFeatures(drawn), images, side, device, **batches)
