"""Where the methods lead on a quadratic whose solution is known."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from bilevel import AlternatingSchedule, Level, Trainer
from bilevel.hypergradients import BOME, F2SA, MASOBA, SABA, SOBA, SRBA, Method
from bilevel.training import power_decay
from tests.support.cases import joined
from tests.support.problems.sampled_quadratic import PROBLEM, blocks, solution, variables


def trained(
    method: Method, steps: int, rates: tuple[float, float], *, size: int | None = 2, decay: float | None = None
) -> Trainer:
    upper, lower = variables()
    optimizers = [torch.optim.SGD(level.values(), lr=lr) for level, lr in zip((upper, lower), rates, strict=True)]
    schedules: list[Any] = [None if decay is None else power_decay(optimizer, decay) for optimizer in optimizers]
    trainer = Trainer(
        PROBLEM,
        Level(upper, optimizers[0], blocks("upper", size), scheduler=schedules[0]),
        Level(lower, optimizers[1], blocks("lower", size), scheduler=schedules[1]),
        AlternatingSchedule(1, 0, steps),
        method,
    )
    trainer.run()
    return trainer


def distance(trainer: Trainer) -> float:
    found = torch.cat([joined(trainer.upper.params), joined(trainer.lower.params)])
    wanted = torch.cat(solution())
    return float((found - wanted).norm() / wanted.norm())


START = distance(trained(SOBA(), 1, (1e-12, 1e-12)))


@pytest.mark.parametrize(
    ("method", "steps", "size"),
    [(SABA(), 350, 2), (SRBA(), 250, 2), (SOBA(), 200, None)],
    ids=["SABA", "SRBA", "whole"],
)
def test_without_noise_in_the_end_the_solution_is_met(method: Method, steps: int, size: int | None) -> None:
    trainer = trained(method, steps, (0.2, 0.4), size=size)
    assert START > 0.5
    assert distance(trainer) < 1e-8
    assert trainer.steps == {"upper": steps, "lower": steps}


@pytest.mark.parametrize("method", [SOBA(), MASOBA()], ids=["SOBA", "MASOBA"])
def test_decaying_rates_lead_nearer_than_constant_ones(method: Method) -> None:
    constant, decaying = (distance(trained(method, 300, (0.2, 0.4), decay=decay)) for decay in (None, 0.5))
    assert decaying < 0.05
    assert decaying < 0.2 * constant


def test_the_bias_of_the_penalised_problem_falls_with_the_penalty() -> None:
    biases = [distance(trained(F2SA(penalty=sigma), 250, (0.4 / sigma, 0.4), size=None)) for sigma in (4.0, 8.0, 16.0)]
    assert biases[0] < 0.05
    ratios = [before / after for before, after in pairwise(biases)]
    assert all(1.7 < ratio < 2.3 for ratio in ratios), ratios
    grown = distance(trained(F2SA(penalty=1.0, growth=0.1), 300, (0.02, 0.4), size=None))
    assert grown < biases[0]


def test_bome_on_the_whole_set_comes_as_near_as_its_step_allows() -> None:
    near = [distance(trained(BOME(0.4, inner_steps=4), 200, (rate, rate), size=None)) for rate in (0.1, 0.05)]
    assert near[0] < 0.1
    assert near[1] < 0.8 * near[0]
