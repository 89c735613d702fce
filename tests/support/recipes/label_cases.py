"""Small runs of the recipe on the digits with labels of another kind."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from recipes.bissl.outcome.pipeline import Pipeline
from recipes.bissl.tasks.base import DownstreamTask
from recipes.experiment.artifacts import Artifact
from recipes.vision.imagesets import DownstreamSets, ImageSet
from recipes.vision.networks.backbones import build_backbone
from tests.support.recipes.small_runs import run_all, small_config, small_pipeline

Relabel = Callable[[ImageSet], Tensor]


def run_with_labels(
    folder: Path, names: tuple[str, ...], relabel: Relabel, *arguments: str
) -> tuple[Pipeline, dict[str, Artifact]]:
    """All stages on the digits, whose labels are ``relabel(images)``."""
    pipeline = small_pipeline(folder, small_config("--bissl.solver=identity", *arguments))
    digits = pipeline.data.downstream
    parts = {
        part: ImageSet(images.images, relabel(images), names, images.name)
        for part, images in (("train", digits.train), ("val", digits.val), ("test", digits.test))
    }
    # A cached property keeps its value among the instance's attributes.
    pipeline.data.__dict__["downstream"] = DownstreamSets(**parts, indices=digits.indices)
    return pipeline, run_all(pipeline)


@torch.no_grad()
def outputs_on_test(pipeline: Pipeline, task: DownstreamTask, artifact: Artifact) -> Tensor:
    """What the fine-tuned model says of the test set."""
    backbone = build_backbone(pipeline.config.model.backbone)
    head = task.build(backbone)
    artifact.load_into({"backbone": backbone, "head": head})
    model: list[nn.Module] = [backbone.eval(), head.eval()]
    view = task.evaluation_view()
    assert view is not None
    return task.forward(model[0], model[1], view(pipeline.data.downstream.test.images.stacked()))
