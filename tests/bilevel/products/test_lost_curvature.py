"""The walk over a gradient's graph, and products against differences of gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel.nn import CheapDoubleBackward, SyncBatchNorm, curvature_pass
from bilevel.products import LOST, ReverseOverReverse, curvature_errors, suspicious_operations
from tests.support.problems.small_modules import FAULTY, OnceDifferentiable, Right, network


def names(loss: Tensor, *variables: Tensor) -> tuple[str, ...]:
    gradient = torch.autograd.grad(loss, variables, create_graph=True)
    return tuple(suspicious_operations([loss, *gradient]))


@pytest.mark.parametrize("function", [*FAULTY, Right])
def test_custom_functions_are_named_wherever_they_stand(function: Any) -> None:
    y = torch.rand(3, requires_grad=True)
    at_the_end = function.apply(y).sum()
    inside = function.apply(y.exp()).square().sum()
    before = function.apply(y).sin().sum()
    for loss in (at_the_end, inside, before):
        found = names(loss, y)
        assert function.__name__ in found
        assert set(found) <= {function.__name__, "a Function marked once_differentiable"}
    assert ("a Function marked once_differentiable" in names(inside, y)) == (function is OnceDifferentiable)


@pytest.mark.parametrize("kind", ["dense", "convolution", "norm", "attention"])
def test_healthy_graphs_and_our_own_functions_are_not(kind: str) -> None:
    module, inputs = network(kind, nn.GELU())
    with curvature_pass(), CheapDoubleBackward():
        loss = module(inputs).logsumexp(1).sum()
        assert names(loss, *module.parameters()) == ()
    norm = SyncBatchNorm(5)
    assert names(norm(torch.rand(4, 5)).square().sum(), *norm.parameters()) == ()


def test_weight_norm_of_torch_is() -> None:
    module = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    assert names(module(torch.ones(1, 3)).exp().sum(), *module.parameters()) == ("torch._weight_norm",)


def errors(objective: Any, x: Tensor, y: Tensor) -> tuple[float, float, str]:
    found = curvature_errors(ReverseOverReverse(), objective, {"x": x}, {"y": y})
    return found.hessian, found.cross, found.doubt


X, Y = torch.linspace(0.5, 1.5, 6, dtype=torch.float64), torch.linspace(-2.0, 2.0, 6, dtype=torch.float64)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("start", [0.0, 1e-3, 1.0, 1e3])
def test_scales_of_variables_and_of_the_objective(scale: float, start: float) -> None:
    def whole(x: Any, y: Any) -> Tensor:
        return scale * (x["x"] * (y["y"].sin() * y["y"])).sum()

    def cut(x: Any, y: Any) -> Tensor:
        return scale * (x["x"] * (y["y"].sin().detach() * y["y"])).sum()

    hessian, cross, doubt = errors(whole, X, start * Y)
    assert max(hessian, cross) < 1e-5
    assert doubt == ""
    assert errors(cut, X, start * Y)[0] > 10 * LOST


def test_kinks_at_the_point_are_left_and_rounding_is_not_taken_for_curvature() -> None:
    def relu(x: Any, y: Any) -> Tensor:
        return (x["x"] * y["y"].relu()).sum()

    # At the kink of every entry; and an objective that is linear in y, however large.
    for objective in (relu, lambda x, y: 1e9 * (x["x"] * y["y"]).sum()):
        hessian, cross, doubt = errors(objective, X, 0.0 * Y)
        assert max(hessian, cross) < 1e-5
        assert doubt == ""


def test_a_small_part_that_is_lost_is_found() -> None:
    def partly(x: Any, y: Any) -> Tensor:
        return (x["x"] * y["y"].square() * (1.0 + 0.01 * y["y"].detach().square())).sum()

    hessian, cross, _ = errors(partly, X, Y)
    assert LOST < hessian < 0.1
    assert cross < 1e-5


def test_noise_decides_nothing() -> None:
    def noisy(x: Any, y: Any) -> Tensor:
        with torch.no_grad():
            noise = 1e-7 * torch.sin(1e12 * y["y"])
        return (x["x"] * noise * y["y"]).sum()

    hessian, _, doubt = errors(noisy, X, Y)
    assert hessian == 0.0
    assert doubt


def test_the_default_generators_are_left() -> None:
    before = torch.get_rng_state()
    errors(lambda x, y: (x["x"] * y["y"].sin()).sum(), X, Y)
    assert torch.equal(before, torch.get_rng_state())
