"""Paths of the image recipe on a simulated device: losses, views, optimizer, micro-batches, evaluation."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.host_reads.device import Crossing, SimulatedDevice
from bilevel import functional_call, linearize, tree
from bilevel.nn import training_autocast
from bilevel.products import ReverseOverReverse, micro_batched_gradient
from recipes.bissl.tasks.byol import BYOL
from recipes.bissl.tasks.classification import Classification
from recipes.bissl.tasks.simclr import SimCLR
from recipes.bissl.tasks.two_views import TwoViewTask
from recipes.bissl.tasks.vicreg import VICReg
from recipes.bissl.training.problem import BiSSLProblem
from recipes.vision.mean_iou import mean_iou
from recipes.vision.metrics import Metric, evaluate, knn_accuracy, map11, mean_absolute_error, r_squared, top_k
from recipes.vision.optimizers import LARS
from recipes.vision.views.batched_views import views_of_crops, views_of_pictures
from recipes.vision.views.view_policy import ViewPolicy, draw

Found = dict[str, list[Crossing]]

SIZE = 6
"""Side of the images (px)."""
TASKS: Mapping[str, type[TwoViewTask]] = {"SimCLR": SimCLR, "BYOL": BYOL, "VICReg": VICReg}
VIEW = ViewPolicy(
    size=SIZE,
    rotation=20.0,
    blur_probability=0.5,
    blur_sigma=(0.1, 1.0),
    solarize_probability=0.5,
    crop_scale=(0.5, 1.0),
)
"""With everything that a view may be made of."""


class Backbone(nn.Module):
    """A convolution and a BatchNorm, pooled."""

    num_features = 5

    def __init__(self) -> None:
        super().__init__()
        pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), *pooled)

    def forward(self, x: Tensor, feature_map: bool = False) -> Tensor:
        return self.body(x)


def problem(device: SimulatedDevice, task: TwoViewTask) -> BiSSLProblem:
    """BiSSL with a small backbone on the device, its lower steps under autocast."""
    downstream = Classification(image_size=SIZE, classes=("a", "b"))  # pyright: ignore[reportCallIssue]
    lower, upper = Backbone(), Backbone()
    heads, head = task.build(lower), downstream.build(upper)
    for module in (lower, upper, heads, head):
        device.put(module)

    def first_order(loss: Any) -> Any:
        def under_autocast(*arguments: Any) -> Tensor:
            with training_autocast("meta"):
                return loss(*arguments)

        return under_autocast

    return BiSSLProblem(task, downstream, lower, upper, heads, head, 0.5, first_order=first_order)


def loss_of(name: str) -> Found:
    """Of one pretext task: a gradient as a training step takes it, one of the upper objective, a product with A."""
    with SimulatedDevice() as device, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options: Any = {"image_size": SIZE, "projector_widths": (4, 4, 4)}
        made = problem(device, TASKS[name](**options))
        upper, lower = made.variables()
        views = device.put((torch.randn(4, 3, SIZE, SIZE), torch.randn(4, 3, SIZE, SIZE)))
        labelled = device.put((torch.randn(4, 3, SIZE, SIZE), torch.tensor([0, 1, 1, 0])))
        # What is done once for a problem is not counted.
        linearize(made, upper, lower, [views], hvp=ReverseOverReverse())
        found: Found = {}
        with device.watched() as found[f"{name}: gradient of a lower step"]:
            tree.gradients(made.lower_objective(upper, lower, views), lower)
        with device.watched() as found[f"{name}: gradient of the upper objective"]:
            tree.gradients(made.upper_objective(upper, lower, labelled), upper | lower)
        system = linearize(made, upper, lower, [views], hvp=ReverseOverReverse(), implicit=made.implicit)
        with device.watched() as found[f"{name}: product with A"]:
            system.operator({name: lower[name].detach() for name in system.implicit})
        return found


def views() -> Found:
    """Views of pictures, and of crops, that lie on the device."""
    with SimulatedDevice() as device:
        generator = torch.Generator().manual_seed(0)
        pictures = device.put(torch.randint(0, 256, (4, 3, 9, 8), dtype=torch.uint8, generator=generator))
        crops = device.put(torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator))
        drawn = draw(VIEW, 4, generator)
        found: Found = {}
        with device.watched() as found["views of pictures"]:
            views_of_pictures(VIEW, pictures, drawn)
        with device.watched() as found["views of crops"]:
            views_of_crops(VIEW, crops, drawn)
        return found


def optimizer() -> Found:
    """A step of LARS."""
    with SimulatedDevice() as device, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = device.put(nn.Linear(4, 3))
        lars = LARS(module.parameters(), lr=0.1, weight_decay=1e-4)
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        with device.watched() as found:
            lars.step()
        return {"LARS step": found}


def chunks() -> Found:
    """A gradient of a contrastive loss in chunks."""
    with SimulatedDevice() as device, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = device.put(nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.2), nn.Linear(6, 3)))
        variables = {name: leaf.detach() for name, leaf in module.named_parameters()}
        parts = [device.put(torch.randn(3, 4)) for _ in range(3)]
        with device.watched() as found:
            micro_batched_gradient(partial(functional_call, module), _contrast, variables, parts)
        return {"micro-batched gradient": found}


def _contrast(z: Tensor) -> Tensor:
    return (z @ z.T).logsumexp(1).sum()


def _scores(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(*shape, generator=generator)


def _labels(count: int, *shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randint(0, count, shape, generator=generator)


METRICS: Mapping[str, tuple[Metric, Any, Any]] = {
    "top_k": (top_k(1), _scores(5, 4), _labels(4, 5)),
    "map11": (map11(), _scores(5, 4), _labels(2, 5, 4)),
    "mean_absolute_error": (mean_absolute_error(), _scores(5, 2), _scores(5, 2)),
    "r_squared": (r_squared(), _scores(5, 2), _scores(5, 2)),
    "mean_iou": (mean_iou(3), _scores(5, 3, 4, 4), _labels(3, 5, 4, 4)),
}
"""By name, with what makes outputs and targets of a batch."""


def evaluation(name: str, batches: int) -> list[Crossing]:
    """An evaluation by one metric and a loss over so many batches."""
    metric, outputs, targets = METRICS[name]
    generator = torch.Generator().manual_seed(0)
    with SimulatedDevice() as device:
        given = [device.put((outputs(generator), targets(generator))) for _ in range(batches)]
        with device.watched() as found:
            evaluate(lambda inputs: inputs, given, {name: metric}, lambda z, t: (z.mean() - t.double().mean()).square())
    return found


def neighbours() -> Found:
    """Nearest neighbours of features on the device."""
    generator = torch.Generator().manual_seed(0)
    with SimulatedDevice() as device:
        given = [device.put(make(generator)) for make in (_scores(8, 3), _labels(2, 8), _scores(5, 3), _labels(2, 5))]
        with device.watched() as found:
            knn_accuracy(*given, neighbours=3)
    return {"nearest neighbours": found}


PATHS: Mapping[str, Callable[[], Found]] = {
    **{name: partial(loss_of, name) for name in TASKS},
    "views": views,
    "optimizer": optimizer,
    "chunks": chunks,
    "neighbours": neighbours,
}
