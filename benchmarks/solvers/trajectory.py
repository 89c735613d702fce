"""Ridge regression whose lower level is stopped early: hypergradients of different kinds against closed forms.

The lower level makes T steps of gradient descent from 0. Every hypergradient is compared with two derivatives: that of
F(x, y*(x)), y* the exact lower solution, by the closed form, and that of F(x, y_T(x)), by differentiating a plain loop.
"""

from typing import Any

import torch
from torch import Tensor

from bilevel import (
    CG,
    Implicit,
    Method,
    Neumann,
    OneStep,
    Params,
    Penalty,
    Problem,
    SGDUpdate,
    Unrolled,
    hypergradient,
)

STEPS = (3, 10, 30, 100, 300, 1000)
FEATURES, POINTS = 20, 60

Batch = tuple[Tensor, Tensor]


class Ridge(Problem):
    """One log-weight a feature; counts how often the lower objective is evaluated."""

    def __init__(self) -> None:
        self.evaluations = 0

    def lower_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        self.evaluations += 1
        X, t = batch
        penalty = (upper["log_weight"].exp() * lower["w"].square()).sum()
        return 0.5 * (X @ lower["w"] - t).square().mean() + 0.5 * penalty

    def upper_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        X, t = batch
        return 0.5 * (X @ lower["w"] - t).square().mean()


def data() -> tuple[Batch, Batch]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(2 * POINTS, FEATURES, generator=generator, dtype=torch.float64)
    X = X * torch.logspace(-0.4, 0.4, FEATURES, dtype=torch.float64)
    t = X @ torch.randn(FEATURES, generator=generator, dtype=torch.float64)
    t = t + torch.randn(2 * POINTS, generator=generator, dtype=torch.float64)
    return (X[:POINTS], t[:POINTS]), (X[POINTS:], t[POINTS:])


def closed_form(x: Tensor, train: Batch, val: Batch) -> Tensor:
    """-exp(x_j) y_j [H^-1 v]_j."""
    X, t = train
    H = X.T @ X / POINTS + torch.diag(x.exp())
    y = torch.linalg.solve(H, X.T @ t / POINTS)
    v = val[0].T @ (val[0] @ y - val[1]) / POINTS
    return -x.exp() * y * torch.linalg.solve(H, v)


def descend(x: Tensor, train: Batch, steps: int, lr: float) -> Tensor:
    """y_T, differentiable in x."""
    X, t = train
    y = torch.zeros(FEATURES, dtype=torch.float64)
    for _ in range(steps):
        y = y - lr * (X.T @ (X @ y - t) / POINTS + x.exp() * y)
    return y


def through_the_loop(x: Tensor, train: Batch, val: Batch, steps: int, lr: float) -> Tensor:
    """d F(x, y_T(x)) / dx."""
    x = x.clone().requires_grad_()
    residual = val[0] @ descend(x, train, steps, lr) - val[1]
    return torch.autograd.grad(0.5 * residual.square().mean(), x)[0]


def methods(lr: float) -> dict[str, Method]:
    update = SGDUpdate(lr)
    return {
        "implicit, CG(200, 1e-10)": Implicit(CG(200, 1e-10)),
        "implicit, Neumann(10, scale=lr)": Implicit(Neumann(10, scale=lr)),
        "unrolled, all T steps": Unrolled(update),
        "unrolled, last 10 steps": Unrolled(update, steps=10),
        "one virtual step (DARTS)": OneStep(lr),
        "penalty (F2SA), sigma = 100": Penalty(update, penalty=100.0),
    }


def measure(*, quick: bool) -> list[dict[str, Any]]:
    train, val = data()
    x = torch.full((FEATURES,), -2.0, dtype=torch.float64)
    H = train[0].T @ train[0] / POINTS + torch.diag(x.exp())
    lr = 1.0 / float(torch.linalg.eigvalsh(H)[-1])
    exact, rows = closed_form(x, train, val), []
    for steps in STEPS[:3] if quick else STEPS:
        y = descend(x, train, steps, lr)
        loop = through_the_loop(x, train, val, steps, lr)
        for name, method in methods(lr).items():
            problem = Ridge()
            # Unrolling makes the steps itself, from their start on.
            makes_steps = isinstance(method, Unrolled)
            lower = {"w": torch.zeros_like(y) if makes_steps else y}
            batches = [train] * (steps if isinstance(method, (Unrolled, Penalty)) else 1)
            result = hypergradient(problem, {"log_weight": x}, lower, method, upper_batch=val, lower_batches=batches)
            grad = result.grad["log_weight"]
            rows.append(
                {
                    "method": name,
                    "steps": steps,
                    "error": float((grad - exact).norm() / exact.norm()),
                    "error_to_loop": float((grad - loop).norm() / loop.norm()),
                    "stationarity": result.stationarity,
                    "evaluations": problem.evaluations + (0 if makes_steps else steps),
                }
            )
    return rows
