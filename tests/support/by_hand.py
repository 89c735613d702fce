"""A coupled problem whose hypergradients without a solve are written out by hand."""

from typing import Any

import torch
from torch import Tensor

from bilevel import Hypergradient, Method, Params, Problem, hypergradient, proximal
from bilevel.hypergradients import OnFailure
from bilevel.products import ForwardOverReverse, HVPProvider, ReverseOverReverse
from tests.support.cases import joined, vector

EXACT: list[HVPProvider] = [ReverseOverReverse(), ReverseOverReverse(keep_graph=True), ForwardOverReverse()]
BATCH = vector(12, 20).reshape(4, 3)
BATCHES = [BATCH, vector(12, 21).reshape(4, 3)]
UPPER_BATCH = vector(12, 22).reshape(4, 3)
RATE = 0.2


class Smooth(Problem):
    """Nothing in it is quadratic, everything is coupled; the regularizer is optional."""

    def __init__(self, weight: float) -> None:
        self.regularization_weight = weight

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        outputs = torch.tanh(batch @ lower["w"] + upper["shift"].sum()) * torch.exp(0.5 * lower["v"].sum() * upper["t"])
        return outputs.square().mean() + 0.3 * torch.cosh(lower["v"]).sum() + 0.2 * (lower["w"] ** 4).sum()

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return (batch @ lower["w"]).sin().mean() + lower["v"].prod() * upper["t"] + upper["shift"].square().sum()

    def regularizer(self, upper: Params, lower: Params) -> Tensor | None:
        return proximal(upper, lower, {"w": "w"}) if self.regularization_weight else None

    def total(self, upper: Params, lower: Params, batches: list[Tensor]) -> Tensor:
        loss = torch.stack([self.lower_objective(upper, lower, batch) for batch in batches]).mean()
        return loss + 0.5 * self.regularization_weight * (lower["w"] - upper["w"]).square().sum()


def smooth(weight: float = 0.3) -> tuple[Smooth, Params, Params]:
    upper = {"w": vector(3, 10), "t": vector(1, 11)[0], "shift": vector(2, 12)}
    return Smooth(weight), upper, {"w": vector(3, 13), "v": vector(2, 14)}


def leaves(x: Params) -> Params:
    return {name: leaf.clone().requires_grad_() for name, leaf in x.items()}


def gradients(value: Tensor, x: Params, **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(x.values()), allow_unused=True, materialize_grads=True, **options))


def by_hand(
    problem: Smooth, upper: Params, lower: Params, at: Params, multiplier: Params | float, batches: list[Tensor]
) -> list[Tensor]:
    """dF/dx(x, at) - cross(x, y) (multiplier * dF/dy(x, at))."""
    x, z = leaves(upper), leaves(at)
    value = problem.upper_objective(x, z, UPPER_BATCH)
    direct, v = gradients(value, x, retain_graph=True), gradients(value, z)
    x, y = leaves(upper), leaves(lower)
    g = gradients(problem.total(x, y, batches), y, create_graph=True)
    scales = list(multiplier.values()) if isinstance(multiplier, dict) else [multiplier] * len(y)
    inner = torch.stack([(slope * scale * part).sum() for slope, scale, part in zip(g, scales, v, strict=True)]).sum()
    return [whole - part for whole, part in zip(direct, gradients(inner, x), strict=True)]


def relative_error(found: Hypergradient, expected: list[Tensor]) -> float:
    reference = torch.cat([leaf.reshape(-1) for leaf in expected])
    return float((joined(found.grad) - reference).norm() / reference.norm())


def run(
    problem: Problem,
    upper: Params,
    lower: Params,
    method: Method,
    *,
    upper_batch: Any = UPPER_BATCH,
    lower_batches: Any = BATCHES,
    on_failure: OnFailure = "warn",
) -> Hypergradient:
    return hypergradient(
        problem, upper, lower, method, upper_batch=upper_batch, lower_batches=lower_batches, on_failure=on_failure
    )
