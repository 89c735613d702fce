"""BiSSL's shape in small, and a trainer for it."""

from typing import Any

import torch
from torch import Tensor

from bilevel import AlternatingSchedule, Implicit, Level, Method, Params, Problem, Trainer, proximal
from bilevel.linear import Dense, Solver
from tests.support.cases import vector, with_spectrum

LAMBDA, DAMPING, GAMMA = 0.7, 1.5, 0.2


class TwoHeads(Problem):
    """BiSSL's shape in small: two backbones tied to each other, a head a level; quadratic, so that all is known."""

    curvature_depends_on_upper = False
    regularization_weight = LAMBDA

    def implicit(self, name: str) -> bool:
        return name == "backbone"

    def lower_objective(self, upper: Params, lower: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        matrix, linear = batch
        z = torch.cat([lower["backbone"], lower["head"]])
        return 0.5 * z @ matrix @ z - linear @ z

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        def loss(backbone: Tensor) -> Tensor:
            return 0.5 * (backbone * upper["head"].sum() - batch).square().sum() + 0.1 * upper["head"].square().sum()

        return loss(lower["backbone"]) + GAMMA * loss(upper["backbone"])

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return proximal(upper, lower, {"backbone": "backbone"})


LOWER_BATCHES = [(with_spectrum([0.5, 0.8, 1.0, 1.5, 2.0], seed), vector(5, 30 + seed)) for seed in range(7)]
UPPER_BATCHES = [vector(3, 40 + seed) for seed in range(4)]
SCHEDULE = AlternatingSchedule(5, 4, 3, 2, 0.25, {"backbone": "backbone"})
LOWER_RATE, UPPER_RATE, LOWER_MOMENTUM, UPPER_MOMENTUM, LIMIT, K = 0.1, 0.05, 0.9, 0.8, 1.0, 3


def variables() -> tuple[Params, Params]:
    upper = {"backbone": vector(3, 1), "head": vector(2, 2)}
    lower = {"backbone": vector(3, 3), "head": vector(2, 4)}
    return upper, lower


def make(
    problem: Problem | None = None,
    method: Method | Solver | None = None,
    *,
    schedule: AlternatingSchedule = SCHEDULE,
    lower_data: Any = LOWER_BATCHES,
    upper_data: Any = UPPER_BATCHES,
    limit: float | None = LIMIT,
    **options: Any,
) -> Trainer:
    """A trainer by `Dense` where no method is given; `options` are the trainer's."""
    upper, lower = variables()
    below = torch.optim.SGD(lower.values(), lr=LOWER_RATE, momentum=LOWER_MOMENTUM)
    above = torch.optim.SGD(upper.values(), lr=UPPER_RATE, momentum=UPPER_MOMENTUM)
    return Trainer(
        problem or TwoHeads(),
        Level(upper, above, upper_data, max_grad_norm=limit),
        Level(lower, below, lower_data, max_grad_norm=limit),
        schedule,
        implicit() if method is None else method,
        **options,
    )


def implicit(solver: Solver | None = None, **options: Any) -> Implicit:
    """The method whose system `ByHand` of test_trainer.py writes out."""
    return Implicit(solver or Dense(), **{"damping": DAMPING, "hessian_batches": K, **options})


def inverse(step: int) -> float:
    return 1.0 / (1 + step)
