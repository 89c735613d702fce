"""Contrastive pairs of views through a small network, and their whole-batch derivatives by plain autograd."""

from typing import Any

import torch
from torch import Tensor, nn

from bilevel import AlternatingSchedule, Level, Params, Problem, Trainer, functional_call
from recipes.vision.losses import nt_xent
from tests.support.cases import joined, vector
from tests.support.problems.small_modules import double

SAMPLES = 7
Batch = tuple[Tensor, Tensor]


def conv_net(*layers: nn.Module) -> nn.Module:
    norm = layers or (nn.GroupNorm(2, 4),)
    head = nn.Flatten(), nn.Linear(36, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)
    return double(nn.Sequential(nn.Conv2d(1, 4, 2), *norm, nn.Softplus(), *head))


class Pairs(Problem):
    """NT-Xent between two views, whose pixels the upper variables weight."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def embed(self, upper: Params, lower: Params, view: Tensor) -> Tensor:
        return functional_call(self.net, lower, view * upper["pixels"].exp())

    def lower_outputs(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        return torch.stack([self.embed(upper, lower, view) for view in batch], dim=1)

    def lower_output_loss(self, upper: Params, outputs: Tensor, batch: Batch) -> Tensor:
        return nt_xent(outputs[:, 0], outputs[:, 1])

    def lower_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        return nt_xent(self.embed(upper, lower, batch[0]), self.embed(upper, lower, batch[1]))

    def upper_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        return self.embed(upper, lower, batch[0]).square().mean()


def views(seed: int = 0, samples: int = SAMPLES) -> Batch:
    first = vector(samples * 16, seed).reshape(samples, 1, 4, 4)
    return first, first + 0.3 * vector(samples * 16, seed + 1).reshape(samples, 1, 4, 4)


def upper_point() -> Params:
    return {"pixels": 0.2 * vector(16, 5).reshape(4, 4), "unused": vector(2, 6)}


def close(found: Params, expected: Params) -> None:
    """To 1e-9 relative over the whole tree."""
    reference = joined(expected)
    assert found.keys() == expected.keys()
    assert float((joined(found) - reference).norm()) <= 1e-9 * float(reference.norm())
    assert float(reference.norm()) > 1e-6


def gradients(value: Tensor, wrt: Params, *, create_graph: bool = False) -> Params:
    found = torch.autograd.grad(
        value, list(wrt.values()), create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return dict(zip(wrt, found, strict=True))


def whole(objective: Any, upper: Params, lower: Params, w: Params) -> tuple[Params, Params, Params]:
    """dL/dy, (d2L/dydy) w and (d2L/dxdy) w by plain autograd on the whole batch."""
    x = {name: leaf.detach().requires_grad_() for name, leaf in upper.items()}
    y = {name: leaf.detach().requires_grad_() for name, leaf in lower.items()}
    g = gradients(objective(x, y), y, create_graph=True)
    slope = torch.stack([(g[name] * w[name]).sum() for name in y]).sum()
    both = gradients(slope, {**{f"x{name}": x[name] for name in x}, **{f"y{name}": y[name] for name in y}})
    detached = {name: leaf.detach() for name, leaf in g.items()}
    return detached, {name: both[f"y{name}"] for name in y}, {name: both[f"x{name}"] for name in x}


def trainer(problem: Problem, upper: Params, lower: Params, batch: Any, *, micro_batch: int | None = None) -> Trainer:
    """One lower step at a rate of 0.1."""
    return Trainer(
        problem,
        Level(upper, torch.optim.SGD(upper.values(), lr=0.1), [batch]),
        Level(lower, torch.optim.SGD(lower.values(), lr=0.1), [batch], micro_batch=micro_batch),
        AlternatingSchedule(1, 1, 0),
    )
