"""Steps on batches of one sample of a quadratic in 100 variables a level, where a call costs more than its arithmetic.

Only what `bilevel` exports, so that it runs with other commits; benchmarks/small_steps.py has more rows.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bilevel import (
    CG,
    SOBA,
    AlternatingSchedule,
    Identity,
    Implicit,
    Level,
    Method,
    Params,
    Problem,
    Trainer,
    hypergradient,
)

SIZE, SAMPLES, CALLS = 100, 32, 40

Batch = tuple[Tensor, Tensor]


class Quadratic(Problem):
    """Per-sample quadratics ``1/2 z'Az + b'z`` of z = (x, y), the same on both levels."""

    def lower_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        z = torch.cat([upper["x"], lower["y"]])
        return 0.5 * (batch[0] @ z) @ z + batch[1] @ z

    def upper_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        return self.lower_objective(upper, lower, batch)


def drawn() -> tuple[Tensor, Tensor, list[Batch]]:
    """x, y and batches."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(SAMPLES, SIZE, 2 * SIZE, generator=generator) / SIZE**0.5
    slopes = torch.randn(SAMPLES, 2 * SIZE, generator=generator)
    x, y = torch.randn(2, SIZE, generator=generator)
    return x, y, list(zip(rows.mT @ rows, slopes, strict=True))


def hypergradients(method: Method) -> Callable[[], object]:
    """`CALLS` hypergradients, each on the next sample."""
    problem, (x, y, batches) = Quadratic(), drawn()

    def step() -> None:
        for call in range(CALLS):
            batch = batches[call % SAMPLES]
            hypergradient(
                problem, {"x": x}, {"y": y}, method, upper_batch=batch, lower_batches=[batch], on_failure="ignore"
            )

    return step


def trainer(method: Method) -> Callable[[], object]:
    """`CALLS` steps of a new trainer that lead nowhere, as the rates are 0."""
    problem, (x, y, batches) = Quadratic(), drawn()

    def step() -> None:
        above, below = x.clone().requires_grad_(), y.clone().requires_grad_()
        upper = Level({"x": above}, torch.optim.SGD([above], lr=0.0), batches)
        lower = Level({"y": below}, torch.optim.SGD([below], lr=0.0), batches)
        Trainer(problem, upper, lower, AlternatingSchedule(1, 0, CALLS), method).run()

    return step


ROWS: dict[str, Callable[[Path], Callable[[], object]]] = {
    "hypergradient, Identity()": lambda _: hypergradients(Implicit(Identity())),
    "hypergradient, CG(1)": lambda _: hypergradients(Implicit(CG(1, None))),
    "Trainer, SOBA": lambda _: trainer(SOBA()),
}
