"""Problems and hand-written optimizer loops for the tests of unrolled hypergradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import Hypergradient, Params, Problem, Unrolled, hypergradient, proximal
from bilevel.hypergradients import OnFailure
from bilevel.hypergradients.updates.torch_updates import TorchUpdate
from bilevel.hypergradients.updates.update import AdamUpdate, SGDUpdate, Update
from tests.support.cases import joined, vector, with_spectrum

BOTH = pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])


def relative_error(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


def split(flat: Tensor, like: Params) -> Params:
    parts = flat.split([leaf.numel() for leaf in like.values()])
    return {name: part.reshape(leaf.shape) for (name, leaf), part in zip(like.items(), parts, strict=True)}


class Quadratic(Problem):
    """L = 1/2 y'Ay + x'Cy + a'y on batches that scale C; F = 1/2 |y - t|^2 + 1/2 |x|^2; proximal if weighted."""

    A = with_spectrum([0.5, 0.8, 1.0, 2.0, 3.0])
    C = vector(20, 1).reshape(4, 5)
    a = vector(5, 2)
    t = vector(5, 3)

    def __init__(self, weight: float = 0.0) -> None:
        self.regularization_weight = weight

    def lower_objective(self, upper: Params, lower: Params, batch: float) -> Tensor:
        y, x = joined(lower), joined(upper)
        return 0.5 * y @ self.A @ y + batch * (x @ self.C @ y) + self.a @ y

    def upper_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
        return 0.5 * (joined(lower) - self.t).square().sum() + 0.5 * joined(upper).square().sum()

    def regularizer(self, upper: Params, lower: Params) -> Tensor | None:
        return proximal(upper, lower, {"body": "x"}) if self.regularization_weight else None

    def optimum(self, upper: Params) -> Params:
        hessian, right = self.A.clone(), -(self.C.T @ joined(upper) + self.a)
        hessian[1:4, 1:4] += self.regularization_weight * torch.eye(3, dtype=torch.float64)
        right[1:4] += self.regularization_weight * upper["x"]
        y = torch.linalg.solve(hessian, right)
        return {"head": y[0], "body": y[1:4], "tail": y[4:]}


def quadratic(weight: float = 0.0) -> tuple[Quadratic, Params, Params]:
    problem, upper = Quadratic(weight), {"x": vector(3, 4), "scale": vector(1, 5)[0]}
    return problem, upper, problem.optimum(upper)


class Smooth(Problem):
    """Nothing in it is quadratic, everything is coupled; upper variables may also set the optimizer."""

    regularization_weight = 0.3

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        outputs = torch.tanh(batch @ lower["w"] + upper["shift"].sum()) * torch.exp(0.5 * lower["v"].sum() * upper["t"])
        return outputs.square().mean() + 0.3 * torch.cosh(lower["v"]).sum() + 0.2 * (lower["w"] ** 4).sum()

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return (batch @ lower["w"]).sin().mean() + lower["v"].prod() * upper["t"] + upper["shift"].square().sum()

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return proximal(upper, lower, {"w": "w"}) + 0.1 * torch.cosh(lower["v"] * upper["t"]).sum()

    def total(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return self.lower_objective(upper, lower, batch) + 0.3 * self.regularizer(upper, lower)


def smooth() -> tuple[Smooth, Params, Params]:
    upper = {"w": vector(3, 10), "t": vector(1, 11)[0], "shift": vector(2, 12), "rate": vector(1, 15)[0] * 0.1 - 2.0}
    return Smooth(), upper, {"w": vector(3, 13), "v": vector(2, 14)}


BATCHES = [vector(12, seed).reshape(4, 3) for seed in (20, 21, 22, 23, 24, 25)]
UPPER_BATCH = BATCHES[0] * 0.5


def momentum_loop(problem: Smooth, x: Params, y: Params, batches: list[Tensor]) -> Params:
    """Nesterov's momentum with weight decay, as a plain differentiable program."""
    velocity = {name: torch.zeros_like(leaf) for name, leaf in y.items()}
    for batch in batches:
        g = torch.autograd.grad(problem.total(x, y, batch), list(y.values()), create_graph=True)
        for (name, leaf), slope in zip(list(y.items()), g, strict=True):
            d = slope + 0.05 * leaf
            velocity[name] = 0.8 * velocity[name] + d
            y = {**y, name: leaf - 0.1 * (d + 0.8 * velocity[name])}
    return y


def adam_loop(problem: Smooth, x: Params, y: Params, batches: list[Tensor]) -> Params:
    """AdamW, its rate the exponential of an upper variable."""
    lr = x["rate"].exp()
    first, second = ({name: torch.zeros_like(leaf) for name, leaf in y.items()} for _ in range(2))
    for t, batch in enumerate(batches, start=1):
        g = torch.autograd.grad(problem.total(x, y, batch), list(y.values()), create_graph=True)
        for (name, leaf), slope in zip(list(y.items()), g, strict=True):
            first[name] = 0.6 * first[name] + 0.4 * slope
            second[name] = 0.7 * second[name] + 0.3 * slope**2
            ratio = first[name] / (1 - 0.6**t) / ((second[name] / (1 - 0.7**t)) ** 0.5 + 0.01)
            y = {**y, name: leaf * (1 - 0.2 * lr) - lr * ratio}
    return y


def rmsprop_loop(problem: Smooth, x: Params, y: Params, batches: list[Tensor]) -> Params:
    second = {name: torch.zeros_like(leaf) for name, leaf in y.items()}
    for batch in batches:
        g = torch.autograd.grad(problem.total(x, y, batch), list(y.values()), create_graph=True)
        for (name, leaf), slope in zip(list(y.items()), g, strict=True):
            second[name] = 0.9 * second[name] + 0.1 * slope**2
            y = {**y, name: leaf - 0.05 * slope / (second[name].sqrt() + 1e-8)}
    return y


Loop = Callable[[Smooth, Params, Params, list[Tensor]], Params]
PROCEDURES: dict[str, tuple[Update | Callable[[Params], Update], Loop]] = {
    "momentum": (SGDUpdate(0.1, 0.8, 0.05, nesterov=True), momentum_loop),
    "adam": (lambda x: AdamUpdate(x["rate"].exp(), (0.6, 0.7), 0.01, 0.2, decoupled=True), adam_loop),
    "rmsprop": (TorchUpdate(torch.optim.RMSprop, {"lr": 0.05, "alpha": 0.9}), rmsprop_loop),
}


def unroll(
    problem: Problem,
    upper: Params,
    lower: Params,
    update: Any,
    *,
    upper_batch: Any = UPPER_BATCH,
    lower_batches: Any = BATCHES,
    on_failure: OnFailure = "warn",
    **options: Any,
) -> Hypergradient:
    """By `Unrolled`, whose `options` are given."""
    return hypergradient(
        problem,
        upper,
        lower,
        Unrolled(update, **options),
        upper_batch=upper_batch,
        lower_batches=lower_batches,
        on_failure=on_failure,
    )
