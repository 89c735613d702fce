"""One pinned BiSSL-shaped system on real photographs: I + H/10.001 of SimCLR after 100 steps, K = 5 batches.

Once on CIFAR-10, where its images are there, and always on 32 x 32 pieces of scikit-learn's two sample photographs.
"""

import copy
import io
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from bilevel import CG, Params, Problem, functional_call, linearize, proximal
from recipes.vision.losses import nt_xent
from tests.support.paths import PHOTOGRAPHS

BATCH, K, STEPS, C = 48, 5, 100, 10.001

needs_archive = pytest.mark.skipif(
    not PHOTOGRAPHS.exists(), reason="CIFAR-10's images are not there (BILEVEL_CIFAR_ZIP)"
)


@dataclass
class SimCLRProblem(Problem):
    """theta_P under NT-Xent, tied to theta_D with the weight c of the damped system."""

    net: nn.Module
    regularization_weight: float = C
    curvature_depends_on_upper: bool = False

    def lower_objective(self, upper: Params, lower: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        first, second = (functional_call(self.net, lower, (view,)) for view in batch)
        return nt_xent(first, second)

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        raise NotImplementedError

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return proximal(upper, lower)


def cifar(count: int) -> list[np.ndarray]:
    with zipfile.ZipFile(PHOTOGRAPHS) as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".jpg"))
        chosen = names[:: len(names) // count][:count]
        return [np.asarray(Image.open(io.BytesIO(archive.read(n))).convert("RGB")) for n in chosen]


def pieces(count: int) -> list[np.ndarray]:
    """Evenly spread over both photographs, none overlapping another."""
    corners = [(row, column) for row in range(0, 427 - 31, 32) for column in range(0, 640 - 31, 32)]
    photographs = load_sample_images().images
    found = [photo[row : row + 32, column : column + 32] for photo in photographs for row, column in corners]
    return found[:: len(found) // count][:count]


def as_tensor(arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(torch.float64) / 255.0 - 0.5


def views(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    def one() -> Tensor:
        shift = torch.randint(-3, 4, (2,), generator=generator).tolist()
        light = 1.0 + 0.4 * (torch.rand(len(images), 3, 1, 1, generator=generator, dtype=images.dtype) - 0.5)
        flipped = images.flip(3) if torch.rand((), generator=generator) < 0.5 else images
        return flipped.roll(shift, (2, 3)) * light

    return one(), one()


def network() -> nn.Sequential:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [*block(3, 8), *block(8, 16), *block(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16)).double()
    # Drawn in float64: another last digit of float32 would be another network after 100 steps.
    for layer in net:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.reset_parameters()
    return net


@pytest.fixture(scope="module", params=[pytest.param(cifar, marks=needs_archive), pieces], ids=lambda f: f.__name__)
def trained(request: pytest.FixtureRequest) -> tuple[nn.Module, list[tuple[Tensor, Tensor]], Params]:
    torch.manual_seed(2)
    generator = torch.Generator().manual_seed(1)
    images, net = as_tensor(request.param(BATCH * K)), network().train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(STEPS):
        rows = torch.randperm(len(images), generator=generator)[:BATCH]
        first, second = views(images[rows], generator)
        optimizer.zero_grad()
        nt_xent(net(first), net(second)).backward()
        optimizer.step()
    batches = [views(images[k * BATCH : (k + 1) * BATCH], generator) for k in range(K)]
    v = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in net.named_parameters()}
    return net, batches, v


def solve(trained: Any, solver: CG, dtype: torch.dtype) -> tuple[Params, Any]:
    net, batches, v = trained
    net = copy.deepcopy(net).to(dtype)
    lower = {n: p.detach() for n, p in net.named_parameters()}
    upper = {n: p.clone() for n, p in lower.items()}
    cast = [tuple(view.to(dtype) for view in batch) for batch in batches]
    before = {n: b.clone() for n, b in net.named_buffers()}
    system = linearize(SimCLRProblem(net), upper, lower, cast, solver=solver)
    solution = system.solve({n: t.to(dtype) for n, t in v.items()})
    assert all(torch.equal(before[n], b) for n, b in net.named_buffers())
    return {n: t.double() for n, t in solution.value.items()}, solution


def distance(a: Params, b: Params) -> float:
    difference = torch.cat([(a[n] - b[n]).flatten() for n in b])
    return float(difference.norm() / torch.cat([t.flatten() for t in b.values()]).norm())


def test_five_global_iterations_solve_it_and_layerwise_does_not(trained: Any) -> None:
    exact, converged = solve(trained, CG(40, 1e-8), torch.float64)
    assert converged.status.ok
    assert converged.min_curvature > 0.0
    five, _ = solve(trained, CG(5, None), torch.float64)
    layerwise, _ = solve(trained, CG(5, None, layerwise=True), torch.float64)
    assert distance(five, exact) < 1e-4
    assert distance(layerwise, exact) > 10 * distance(five, exact)
    # The system is not the identity, or all of this would show nothing.
    assert distance(trained[2], exact) > 1e-2


def test_float32_agrees_with_float64(trained: Any) -> None:
    double, _ = solve(trained, CG(5, None), torch.float64)
    single, _ = solve(trained, CG(5, None), torch.float32)
    assert distance(single, double) < 1e-3
