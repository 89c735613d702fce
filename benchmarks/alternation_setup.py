"""The pinned BiSSL point that alternation.py measures at."""

from dataclasses import dataclass
from typing import Any

import torch
from sklearn.datasets import load_sample_images
from torch import Tensor

from recipes.bissl.compute import Computing
from recipes.bissl.config_sections import ComputeConfig
from recipes.bissl.data import load_downstream, load_pretext
from recipes.bissl.imagesets import ImageSet
from recipes.bissl.models import build_backbone
from recipes.bissl.optim import LARS
from recipes.bissl.problem import BiSSLProblem
from recipes.bissl.tasks.classification import Classification
from recipes.bissl.tasks.simclr import SimCLR

SIDE, LOWER_BATCH, UPPER_BATCH = 32, 96, 48
LOWER_STEPS, UPPER_STEPS, HESSIAN_BATCHES = 20, 8, 5
C, GAMMA, LAMBDA = 10.001, 0.01, 0.001


@dataclass(frozen=True)
class Setup:
    """The problem at the pinned weights, and one alternation's batches.

    Attributes:
        source: of the images.
        warm_up: SimCLR steps from random weights to the pinned point.
    """

    problem: BiSSLProblem
    lower_batches: list[Any]
    upper_batches: list[Any]
    device: torch.device
    source: str
    warm_up: int

    def describe(self) -> dict[str, Any]:
        return {
            "images": self.source.partition(":")[0],
            "warm_up_steps": self.warm_up,
            "parameters": sum(p.numel() for p in self.problem.lower_backbone.parameters()),
            "lower_batch": len(self.lower_batches[0][0]),
            "upper_batch": len(self.upper_batches[0][0]),
            "side": SIDE,
        }


def make_setup(source: str, device: torch.device, *, quick: bool) -> Setup:
    """Train to the pinned point; `quick` takes a twentieth of the steps and an eighth of the batches."""
    torch.manual_seed(0)
    pretext_images, labelled = _images(source)
    assert labelled.labels is not None
    pretext = SimCLR(image_size=SIDE)  # type: ignore[call-arg]
    downstream = Classification(image_size=SIDE, classes=labelled.classes)  # type: ignore[call-arg]
    lower, upper = build_backbone("resnet-tiny"), build_backbone("resnet-tiny")
    heads, head = pretext.build(lower), downstream.build(upper)
    for module in (lower, upper, heads, head):
        module.to(device).train()
    move = Computing(ComputeConfig(), device).move
    share, warm_up = (8, 8) if quick else (1, 150)
    generator = torch.Generator().manual_seed(1)
    views = pretext.transform()

    def batch() -> Any:
        rows = torch.randint(len(pretext_images), (LOWER_BATCH // share,), generator=generator)
        return move(views(pretext_images.images[rows], generator))

    optimizer = LARS([*lower.parameters(), *heads.parameters()], lr=0.5, weight_decay=1e-6)
    for _ in range(warm_up):
        optimizer.zero_grad()
        pretext.loss(lower, dict(heads.items()), batch()).backward()
        optimizer.step()
    upper.load_state_dict(lower.state_dict())
    transform = downstream.transform(train=True)
    upper_batches = []
    for _ in range(UPPER_STEPS):
        rows = torch.randint(len(labelled), (UPPER_BATCH // min(share, 4),), generator=generator)
        upper_batches.append(move(transform(labelled.images[rows], labelled.labels[rows], generator)))
    problem = BiSSLProblem(pretext, downstream, lower, upper, heads, head, regularization_weight=LAMBDA, gamma=GAMMA)
    return Setup(problem, [batch() for _ in range(LOWER_STEPS)], upper_batches, device, source, warm_up)


def _images(source: str) -> tuple[ImageSet, ImageSet]:
    if source == "photographs":
        return _crops()
    common: dict[str, Any] = {"image_size": SIDE, "root": "data", "download": False}
    pretext = load_pretext(source, limit=3000, **common)
    return pretext, load_downstream(source, labels_per_class=50, val_per_class=10, val_fraction=0.2, **common).train


def _crops() -> tuple[ImageSet, ImageSet]:
    """Crops of the two photographs that scikit-learn brings, each photograph a class."""
    generator, parts, labels = torch.Generator().manual_seed(0), [], []
    for label, array in enumerate(load_sample_images().images):
        photograph = torch.from_numpy(array.copy()).permute(2, 0, 1)
        for _ in range(400):
            top = int(torch.randint(photograph.shape[1] - 4 * SIDE, (), generator=generator))
            left = int(torch.randint(photograph.shape[2] - 4 * SIDE, (), generator=generator))
            crop: Tensor = photograph[:, top : top + 4 * SIDE, left : left + 4 * SIDE]
            parts.append(crop.reshape(3, SIDE, 4, SIDE, 4).float().mean(dim=(2, 4)).to(torch.uint8))
            labels.append(label)
    both = ImageSet(torch.stack(parts), torch.tensor(labels), ("temple", "flower"), "photographs")
    return both, both
