"""One alternation of BiSSL's shape on a small convolutional network: 4 lower steps, 2 upper steps, 2 stored batches.

The lower level matches two views of images and is held near the upper network; the upper one classifies. Only what
`bilevel` exports, so that it runs with other commits; benchmarks/alternation/run.py measures the recipe's own.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from bilevel import (
    CG,
    AlternatingSchedule,
    Identity,
    Implicit,
    Level,
    Params,
    Problem,
    Trainer,
    functional_call,
    proximal,
)
from bilevel.products import ReverseOverReverse

LOWER_STEPS, UPPER_STEPS, IMAGES, SIDE = 4, 2, 16, 16

Batch = tuple[Tensor, Tensor]


class Matching(Problem):
    """Two views of an image have like features below, which classify images above."""

    regularization_weight = 0.01
    curvature_depends_on_upper = False

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def lower_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        first, second = (functional_call(self.network, lower, (views,)) for views in batch)
        return (first - second).square().mean() - first.std(0).mean()

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return proximal(upper, lower)

    def upper_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        images, targets = batch
        return nn.functional.cross_entropy(functional_call(self.network, lower, (images,)), targets)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


def alternation(method: Implicit) -> Callable[[], object]:
    """A new trainer from the same weights, one alternation long."""
    net, generator = network(), torch.Generator().manual_seed(1)

    def views() -> Tensor:
        return torch.randn(IMAGES, 3, SIDE, SIDE, generator=generator)

    pairs = [(views(), views()) for _ in range(LOWER_STEPS)]
    labelled = [(views(), torch.randint(10, (IMAGES,), generator=generator)) for _ in range(UPPER_STEPS)]
    start = {name: leaf.detach() for name, leaf in net.named_parameters()}

    def step() -> None:
        below, above = ({name: leaf.clone().requires_grad_() for name, leaf in start.items()} for _ in range(2))
        lower = Level(below, torch.optim.SGD(list(below.values()), lr=0.1), pairs)
        upper = Level(above, torch.optim.SGD(list(above.values()), lr=0.1), labelled)
        Trainer(Matching(net), upper, lower, AlternatingSchedule(1, LOWER_STEPS, UPPER_STEPS), method).run()

    return step


def solved(solver: CG | Identity, *, aggregate: bool) -> Callable[[Path], Callable[[], object]]:
    def make(_: Path) -> Callable[[], object]:
        products = ReverseOverReverse(keep_graph=True)
        return alternation(Implicit(solver, hvp=products, damping=1.0, hessian_batches=2, aggregate=aggregate))

    return make


ROWS: dict[str, Callable[[Path], Callable[[], object]]] = {
    "a CG(5) each upper step": solved(CG(5, None), aggregate=False),
    "one CG to the noise": solved(CG(10, "noise"), aggregate=True),
    "Identity()": solved(Identity(), aggregate=False),
}
