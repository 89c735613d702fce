"""Micro-batched products with dropout on tensors whose memory is not in the order of their indices, in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bilevel import Params, Problem, functional_call, linearize
from bilevel.hypergradients import System
from bilevel.products import HVPProvider, ReverseOverReverse
from bilevel.products.micro_batch import MicroBatched
from tests.support.cases import joined, vector
from tests.support.pairs import close
from tests.support.problems.small_modules import parameters, split

SAMPLES = 6


class Transposed(nn.Module):
    """Dropout on a view whose last two dimensions are exchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.dropout, self.last = nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.first(x).tanh().transpose(1, 2))
        assert not hidden.is_contiguous()
        return self.last(hidden).flatten(1)


class ChannelsLast(nn.Module):
    """Dropout on images whose channels lie next to each other in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.dropout, self.last = nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Conv2d(4, 2, 3)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.first(x).tanh())
        assert not hidden.is_contiguous()
        return self.last(hidden).mean(dim=(2, 3))


class Coupled(Problem):
    """A loss in which samples meet; the upper variable scales the inputs."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net.double()

    def lower_outputs(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return functional_call(self.net, lower, batch * upper["scale"])

    def lower_output_loss(self, upper: Params, outputs: Tensor, batch: Tensor) -> Tensor:
        return torch.logsumexp(outputs @ outputs.t(), dim=1).mean()

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return self.lower_output_loss(upper, self.lower_outputs(upper, lower, batch), batch)

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return self.lower_objective(upper, lower, batch)


Build = Callable[[torch.device], tuple[Coupled, Tensor]]


def transposed(device: torch.device) -> tuple[Coupled, Tensor]:
    return Coupled(Transposed().to(device)), vector(SAMPLES * 15, 1).reshape(SAMPLES, 3, 5).to(device)


def channels_last(device: torch.device) -> tuple[Coupled, Tensor]:
    images = vector(SAMPLES * 147, 1).reshape(SAMPLES, 3, 7, 7)
    return Coupled(ChannelsLast().to(device)), images.to(device, memory_format=torch.channels_last)


def systems(build: Build, device: torch.device, *providers: HVPProvider) -> tuple[list[System], Params, Params]:
    """One system by each provider, all with the same masks, and two directions."""
    torch.manual_seed(0)
    problem, batch = build(device)
    upper, lower = {"scale": batch.new_tensor(0.8)}, parameters(problem.net)
    found = []
    for hvp in providers:
        torch.manual_seed(5)
        found.append(linearize(problem, upper, lower, [batch], hvp=hvp))
    v, w = (split(vector(joined(lower).numel(), seed).to(device), lower) for seed in (3, 4))
    return found, v, w


on_layouts = pytest.mark.parametrize("build", [transposed, channels_last])


@on_layouts
@pytest.mark.parametrize("size", [2, 4, SAMPLES])
def test_products_are_symmetric_in_every_memory_layout(build: Build, size: int, device: torch.device) -> None:
    (system,), v, w = systems(build, device, MicroBatched(size))
    hv, hw = joined(system.operator(v)), joined(system.operator(w))
    there, back = torch.dot(joined(w), hv), torch.dot(joined(v), hw)
    assert float(hv.norm()) > 1e-3
    assert abs(float(there - back)) <= 1e-10 * float(joined(w).norm() * hv.norm())


@on_layouts
def test_a_single_chunk_has_the_products_of_the_whole_batch(build: Build, device: torch.device) -> None:
    (chunked, whole), _, w = systems(build, device, MicroBatched(SAMPLES), ReverseOverReverse())
    close(chunked.operator(w), whole.operator(w))
    close(chunked.cross(w), whole.cross(w))
    close(chunked.gradient(), whole.gradient())
