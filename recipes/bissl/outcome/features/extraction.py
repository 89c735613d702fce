"""Features of a trained backbone on labelled images, with batch statistics of those images (paper, appendix C.1)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bilevel import BatchStack
from bilevel.training import derive_seed

from ....experiment.artifacts import Artifact
from ....experiment.errors import ConfigError
from ....vision.imagesets import ImageSet
from ....vision.networks.backbones import build_backbone
from ...training.image_batches import Batches

BATCHES, BATCH_SIZE = 100, 256
"""Of training images that refresh the batch statistics (paper, appendix C.1: "roughly 100 batches" of 256)."""

Array = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class LabelledFeatures:
    """Pooled features ``[N, num_features]`` and class indices ``[N]``, in the order of the set."""

    features: Array
    labels: Labels


@torch.no_grad()
def refresh_batch_norm(backbone: nn.Module, batches: Iterable[Tensor]) -> int:
    """Replace the running statistics of BatchNorm by those of `batches`; the number of layers that have any.

    Every statistic becomes the mean over the batches, each with the same weight, of a batch's mean or unbiased
    variance; nothing of the earlier statistics stays. Layers are otherwise in evaluation mode, so that nothing random
    enters, and all of `backbone` is afterwards. Without such layers nothing is computed.

    Args:
        backbone: Changed in place.
        batches: Inputs ``[N, 3, H, W]`` on the backbone's device, of one size.

    Source: the paper's appendix C.1, which passes training batches forward and leaves the kind of average open.
    """
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    layers = [layer for layer in backbone.modules() if isinstance(layer, kinds) and layer.track_running_stats]
    backbone.eval()
    if not layers:
        return 0
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        # None: the plain mean of all batches so far, where a number would forget the first of them.
        layer.momentum = None
        layer.train()
    for inputs in batches:
        backbone(inputs)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    backbone.eval()
    return len(layers)


def arm_features(
    batches: Batches, artifact: Artifact, evaluated: ImageSet
) -> tuple[LabelledFeatures, LabelledFeatures]:
    """Features of the training images and of `evaluated`, of the artifact's "backbone" after `refresh_batch_norm`.

    All images, also those that refresh, are seen in the downstream task's evaluation view. The artifact stays as it is.

    Raises:
        ConfigError: the task's inputs are no tensors of images.
        ArtifactError: the weights are damaged or do not fit.
    """
    settings, train = batches.settings, batches.data.downstream.train
    backbone = build_backbone(settings.model.backbone, image_size=settings.data.image_size)
    artifact.load_into({"backbone": backbone})
    batches.computing.place(backbone)
    refresh_batch_norm(backbone, training_batches(batches))
    return _features(batches, backbone, train), _features(batches, backbone, evaluated)


def training_batches(batches: Batches) -> Iterator[Tensor]:
    """`BATCHES` shuffled batches of training images, of `BATCH_SIZE` or, where there are fewer images, all of them."""
    images = batches.data.downstream.train
    task = batches.settings.downstream_task(images.classes)

    def load(indices: Tensor, seed: int) -> Tensor:
        return _images(batches.evaluation_inputs(images, task, indices), task)

    size = min(BATCH_SIZE, len(images))
    stack = BatchStack(len(images), size, load, seed=derive_seed(batches.seed, "batch statistics"), drop_last=True)
    return (stack.next() for _ in range(BATCHES))


@torch.no_grad()
def _features(batches: Batches, backbone: nn.Module, images: ImageSet) -> LabelledFeatures:
    task = batches.settings.downstream_task(images.classes)
    evaluated = batches.evaluation(images, task)
    found = torch.cat([backbone(_images(rows.inputs, task)).float() for rows, _ in evaluated])
    labels = images.labels
    assert labels is not None, "checked by the caller"
    return LabelledFeatures(found.cpu().double().numpy(), labels.cpu().numpy())


def _images(inputs: object, task: object) -> Tensor:
    if not isinstance(inputs, Tensor):
        raise ConfigError(
            f"downstream.task: {type(task).__name__} makes {type(inputs).__name__} of images, but features are made "
            "from one tensor a batch; this command cannot show such a task"
        )
    return inputs
