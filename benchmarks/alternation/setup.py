"""The pinned BiSSL point that alternation.py measures at."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from sklearn.datasets import load_sample_images
from torch import Tensor

from recipes.bissl.settings.sections import ComputeConfig
from recipes.bissl.tasks.classification import Classification
from recipes.bissl.tasks.simclr import SimCLR
from recipes.bissl.training.compute import Computing
from recipes.bissl.training.problem import BiSSLProblem
from recipes.vision.imagesets import ImageSet
from recipes.vision.networks.backbones import build_backbone
from recipes.vision.pipeline.loader import Loader
from recipes.vision.pipeline.workers import Workers
from recipes.vision.sources.loading import load_downstream, load_pretext
from recipes.vision.views.view_policy import ViewPolicy

SIDE = 32
GAMMA, LAMBDA = 0.01, 0.001


@dataclass(frozen=True)
class Sizes:
    """How long the warm-up is, how many alternations follow, what one takes, and the damping c of its system."""

    warm_up: int = 150
    alternations: int = 3
    lower_batch: int = 96
    upper_batch: int = 48
    lower_steps: int = 20
    upper_steps: int = 8
    hessian_batches: int = 5
    c: float = 10.001


# A few images a batch have more curvature, which takes more damping for as few iterations.
QUICK = Sizes(25, 2, lower_batch=16, upper_batch=8, lower_steps=2, upper_steps=2, hessian_batches=2, c=60.0)
"""A try in a minute or two: of another system, whose figures are not for reading."""


@dataclass(frozen=True)
class Setup:
    """The problem at the pinned weights, and the batches of all alternations, every one of them with its own.

    Attributes:
        source: of the images.
        sizes: of the warm-up to the pinned point and of the alternation.
    """

    problem: BiSSLProblem
    lower_batches: list[Any]
    upper_batches: list[Any]
    device: torch.device
    source: str
    sizes: Sizes

    def describe(self) -> dict[str, Any]:
        parameters = sum(p.numel() for p in self.problem.lower_backbone.parameters())
        return {"images": self.source.partition(":")[0], "parameters": parameters, "side": SIDE, **asdict(self.sizes)}


def make_setup(source: str, device: torch.device, sizes: Sizes) -> Setup:
    """Train to the pinned point, and draw the batches of one alternation."""
    torch.manual_seed(0)
    pretext_images, labelled = _images(source)
    assert labelled.labels is not None
    pretext = SimCLR(image_size=SIDE)  # type: ignore[call-arg]
    downstream = Classification(image_size=SIDE, classes=labelled.classes)  # type: ignore[call-arg]
    lower, upper = build_backbone("resnet-tiny"), build_backbone("resnet-tiny")
    heads, head = pretext.build(lower), downstream.build(upper)
    for module in (lower, upper, heads, head):
        module.to(device).train()
    computing, generator = Computing(ComputeConfig(), device), torch.Generator().manual_seed(1)

    def loader(images: ImageSet, *views: ViewPolicy) -> Loader:
        return Loader(images.images, views, Workers(0), transfer=computing.transfer)

    def drawn(loader: Loader, count: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        rows = torch.randint(len(loader.images), (count,), generator=generator)
        return rows, computing.move(loader.make(rows, int(torch.randint(2**31, (), generator=generator))))

    unlabelled = loader(pretext_images, *pretext.random_views())

    def batch() -> Any:
        return drawn(unlabelled, sizes.lower_batch)[1]

    optimizer = torch.optim.SGD([*lower.parameters(), *heads.parameters()], lr=0.05, momentum=0.9)
    for _ in range(sizes.warm_up):
        optimizer.zero_grad()
        pretext.loss(lower, dict(heads.items()), batch()).backward()
        optimizer.step()
    upper.load_state_dict(lower.state_dict())
    training, upper_batches = loader(labelled, downstream.train_view()), []
    for _ in range(sizes.alternations * sizes.upper_steps):
        rows, views = drawn(training, sizes.upper_batch)
        upper_batches.append((*views, computing.move(labelled.labels[rows])))
    problem = BiSSLProblem(pretext, downstream, lower, upper, heads, head, regularization_weight=LAMBDA, gamma=GAMMA)
    return Setup(
        problem,
        [batch() for _ in range(sizes.alternations * max(sizes.lower_steps, 2 * sizes.hessian_batches))],
        upper_batches,
        device,
        source,
        sizes,
    )


def _images(source: str) -> tuple[ImageSet, ImageSet]:
    if source == "photographs":
        return _crops()
    common: dict[str, Any] = {"root": "data", "download": False}
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
