"""Small modules, the problem of fitting them, and dense derivatives of functions written by hand."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel import Params, Problem, functional_call, linearize, proximal
from bilevel.products import ForwardOverReverse, HVPProvider, ReverseOverReverse
from tests.support.cases import joined, vector

EXACT: list[HVPProvider] = [ReverseOverReverse(), ReverseOverReverse(keep_graph=True), ForwardOverReverse()]


class Fit(Problem):
    """A module's outputs, squashed and averaged; both levels call the same module."""

    regularization_weight = 0.5

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return torch.tanh(functional_call(self.module, lower, batch)).square().mean() * 3.0

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return functional_call(self.module, lower, (batch,)).sin().mean()

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return proximal(upper, lower)


class StopsGradients(Fit):
    """Of a module that detaches a part of what it computes, and means it."""

    check_curvature = False


def double(module: nn.Module, seed: int = 0) -> nn.Module:
    """In float64, with random parameters of size one."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def parameters(module: nn.Module) -> Params:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def split(flat: Tensor, like: Params) -> Params:
    parts = flat.split([leaf.numel() for leaf in like.values()])
    return {name: part.reshape(leaf.shape) for (name, leaf), part in zip(like.items(), parts, strict=True)}


def dense_hessian(function: Callable[[Params], Tensor], at: Params) -> Tensor:
    hessian = torch.autograd.functional.hessian(lambda flat: function(split(flat, at)), joined(at))
    assert isinstance(hessian, Tensor)
    return hessian


def check_products(problem: Fit, loss: Callable[[Params], Tensor], batch: Tensor, hvp: HVPProvider) -> None:
    """The system's products against the dense Hessian of an independent function."""
    lower = parameters(problem.module)
    reference = dense_hessian(loss, lower) / 2.5
    system = linearize(problem, lower, lower, [batch], hvp=hvp, damping=2.0)
    tolerance = 1e-11 if hvp.exact else 1e-6
    for seed in range(2):
        w = vector(joined(lower).numel(), seed)
        torch.testing.assert_close(
            joined(system.operator(split(w, lower))), reference @ w + w, rtol=0.0, atol=tolerance * float(w.norm())
        )


def convolutional() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)),
    )


def convolutional_by_hand(p: Params, x: Tensor, *, training: bool, buffers: dict[str, Tensor]) -> Tensor:
    def norm(h: Tensor, k: int) -> Tensor:
        if training:
            return F.batch_norm(h, None, None, p[f"{k}.weight"], p[f"{k}.bias"], training=True)
        return F.batch_norm(
            h, buffers[f"{k}.running_mean"], buffers[f"{k}.running_var"], p[f"{k}.weight"], p[f"{k}.bias"]
        )

    h = norm(F.conv2d(x, p["0.weight"]), 1).tanh().mean(dim=(2, 3))
    h = norm(F.linear(h, p["5.weight"], p["5.bias"]), 6).tanh()
    return F.linear(h, p["8.weight"], p["8.bias"])


IMAGES = vector(6 * 2 * 25, 50).reshape(6, 2, 5, 5)


def with_history(module: nn.Module) -> nn.Module:
    """The module after one plain training pass, so that its running statistics are not the initial ones."""
    module.train()
    module(IMAGES + 0.5)
    return module


def everything(module: nn.Module) -> tuple[dict[str, Tensor], list[Any]]:
    state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    return state, [(type(m), m.training, getattr(m, "track_running_stats", None)) for m in module.modules()]


def check_untouched(module: nn.Module, before: tuple[dict[str, Tensor], list[Any]]) -> None:
    after = everything(module)
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1] == after[1]
    assert all(parameter.grad is None for parameter in module.parameters())


BATCH = vector(15, 51).reshape(5, 3)
