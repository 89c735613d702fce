"""Random draws where tensors lie on a device: whose generator draws, and that the others stay where they were."""

import pytest
import torch
from torch import nn

from bilevel import Implicit, Neumann, Params, hypergradient, linearize
from bilevel.linear import Nystrom, Solver
from bilevel.nn import TorchMark, seeded
from bilevel.products import ReverseOverReverse
from tests.support.cases import joined, vector
from tests.support.problems.device_networks import made
from tests.support.problems.small_modules import Fit, double, parameters, split


def gradient(device: torch.device, solver: Solver) -> Params:
    problem, upper, lower, batch = made("weight norm", device)
    method, options = Implicit(solver), {"upper_batch": batch, "lower_batches": [batch]}
    return hypergradient(problem, upper, lower, method, on_failure="ignore", **options).grad


@pytest.mark.parametrize("solver", [Nystrom(4), Neumann(3)], ids=lambda solver: type(solver).__name__)
def test_what_a_solver_draws_is_the_same_whatever_was_drawn_before(solver: Solver, device: torch.device) -> None:
    """Its sketch or its start is drawn by a generator of its own, on the CPU for every device."""
    torch.manual_seed(1)
    first = gradient(device, solver)
    torch.manual_seed(2)
    torch.rand(100, device=device)
    second = gradient(device, solver)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("keep_graph", [False, True])
def test_a_system_keeps_one_set_of_masks(keep_graph: bool, device: torch.device) -> None:
    """Its Hessian is symmetric only if every product has the same dropout masks, which the device draws."""
    module = double(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 2)))
    problem, batch = Fit(module.to(device)), vector(18, 51).reshape(6, 3).to(device)
    lower = parameters(module)
    torch.manual_seed(3)
    system = linearize(problem, lower, lower, [batch], hvp=ReverseOverReverse(keep_graph=keep_graph))
    v, w = (split(vector(joined(lower).numel(), number).to(device), lower) for number in (1, 2))
    torch.rand(7, device=device)
    hv, hw = joined(system.operator(v)), joined(system.operator(w))
    assert torch.equal(hv, joined(system.operator(v)))
    assert abs(float(joined(w) @ hv - joined(v) @ hw)) <= 1e-12 * float(joined(w).norm() * hv.norm())


def test_a_seeded_block_puts_the_devices_generator_back(device: torch.device) -> None:
    torch.rand(1, device=device)
    mark = TorchMark()
    with seeded(5):
        inside = torch.rand(4, device=device)
        assert mark.moved()
    assert not mark.moved()
    with seeded(5):
        assert torch.equal(torch.rand(4, device=device), inside)
