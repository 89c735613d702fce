"""What the prediction rests on: figures that other benchmarks have measured, and counts that no clock is needed for."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measuring
from benchmarks.scaling.model import Machine
from bilevel import Params, Problem, functional_call, linearize
from bilevel.compare import lower_gradient
from recipes.bissl.tasks.simclr import SimCLR
from recipes.vision.networks.backbones import build_backbone

RESULTS = Path(__file__).resolve().parents[1] / "results"
WAYS = ("files: crops", "disk cache: crops", "memory: crops")
USED = "disk cache: crops"


class Pretext(Problem):
    """SimCLR as a lower level."""

    check_curvature = False

    def __init__(self, backbone: str, pixels: int) -> None:
        torch.manual_seed(0)
        network = build_backbone(backbone)
        self.task = SimCLR(image_size=pixels)  # type: ignore[call-arg]
        self.module = _Loss(self.task, network, self.task.build(network))
        self.shape = (3, pixels, pixels)

    def lower_objective(self, upper: Params, lower: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional_call(self.module, lower, (batch,))

    def lower(self) -> Params:
        return {name: p.detach() for name, p in self.module.named_parameters()}

    def batch(self, images: int) -> tuple[Tensor, Tensor]:
        return torch.randn(images, *self.shape), torch.randn(images, *self.shape)


class _Loss(nn.Module):
    def __init__(self, task: SimCLR, network: nn.Module, heads: nn.ModuleDict) -> None:
        super().__init__()
        self.task, self.network, self.heads = task, network, heads

    def forward(self, views: tuple[Tensor, Tensor]) -> Tensor:
        return self.task.loss(self.network, dict(self.heads.items()), views)


def count(*, quick: bool) -> dict[str, Any]:
    """Operations of a gradient an image, both views, and the memory that an image of a batch takes in a gradient and in
    a product, in float32: by the difference of two batches."""
    problem = Pretext("resnet-tiny", 32) if quick else Pretext("resnet18", 96)
    lower, (small, large) = problem.lower(), (2, 4) if quick else (8, 16)

    def step(images: int) -> Callable[[], object]:
        batch = problem.batch(images)
        return lambda: lower_gradient(problem, {}, lower, batch)

    def product(images: int) -> Callable[[], object]:
        operator = linearize(problem, {}, lower, [problem.batch(images)]).operator
        vector = {name: torch.ones_like(leaf) for name, leaf in lower.items()}
        return lambda: operator(vector)

    def an_image(make: Callable[[int], Callable[[], object]]) -> float:
        first, second = (measuring.peak_memory(make(images)) for images in (small, large))
        return (second - first) / (large - small)

    with FlopCounterMode(display=False) as counter:
        step(small)()
    return {
        "environment": measuring.environment(),
        "quick": quick,
        "flops": counter.get_total_flops() / small,
        "step_bytes": an_image(step),
        "product_bytes": an_image(product),
    }


def kept(name: str) -> dict[str, Any]:
    """The figures of another benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def gather(counted: Mapping[str, Any], product_cost: float, **chosen: float) -> dict[str, Any]:
    """The assumptions, with the images a second and core of each way to load, and products of settings that stop by
    themselves; `chosen` are numbers of `Machine` that are given by hand."""
    pretext = kept("pretext")
    speed = kept("loading")["speed"]
    ways = {way: speed[way]["images_per_core_second"] for way in WAYS}
    machine = Machine(
        product_cost=product_cost,
        augmentation=_rate(pretext["step"]["bilevel"]) / _rate(pretext["pipeline"]["float crops"]),
        loading=ways[USED],
        flops=counted["flops"],
        step_bytes=counted["step_bytes"],
        product_bytes=counted["product_bytes"],
        vectors=_vectors(),
    )
    sizes = kept("communication")["paper"]["synchronised"][0]
    return {
        "machine": vars(replace(machine, **chosen)),
        "sizes": sizes,
        "ways": ways,
        "products": products_of_an_alternation(kept("alternation")),
    }


def products_of_an_alternation(figures: Mapping[str, Any]) -> dict[str, float]:
    """Products with A, those on some of the K batches in part, in the mean over the benchmark's alternations."""
    batches = {"default": figures["setup"]["hessian_batches"], "two_batches": 2}
    return {name: round(mean(figures["overhead"][name]["hvps"]) / k, 2) for name, k in batches.items()}


def _rate(entry: Mapping[str, Any]) -> float:
    return entry["images_per_second"]["median"]


def _vectors() -> float:
    """Of the peak of a hypergradient with K = 5, with y, x and a momentum of each."""
    newest = max(kept("sharding").values(), key=lambda found: found["environment"]["torch"])
    return newest["vectors"]["CG, 5 iterations"]["5"] + 4.0
