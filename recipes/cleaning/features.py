"""The stage that sees pictures: frozen features of all of them, once for all repeats."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..experiment.artifacts import Artifact, make_key
from ..experiment.stage import Attempt, CachedStage, Tensors
from ..experiment.stage_training import Seconds
from ..experiment.workspace import Workspace
from .data import Pictures
from .settings import Config

STAGE = "features"


def run(config: Config, pictures: Pictures, device: torch.device, workspace: Workspace) -> Artifact:
    """The features of all pictures, float32 [N, D] as "all.features": centred, and of variance 1 on average."""
    frozen = config.features

    def fit(attempt: Attempt) -> tuple[Mapping[str, nn.Module], dict[str, Any]]:
        seconds = Seconds()
        found = frozen.of(list(pictures.parts.values()), config.data.num_workers, device)
        centred = found - found.mean(0)
        scale = centred.square().mean().sqrt().clamp(min=1e-12)
        return {"all": Tensors({"features": centred / scale})}, {"seconds": seconds.total(), "width": found.shape[1]}

    key = make_key(STAGE, 0, None, frozen.decisive, list(pictures.parts), pictures.identity.labelled)
    return CachedStage(workspace.store, STAGE, key).run(fit)
