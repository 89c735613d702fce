"""Passes are seeded only where a problem draws, and generators are left as they were found."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bilevel import Params, Problem
from bilevel.lower import Draw, Oracles, all_repeatable, draws
from bilevel.lower.repeatable import repeatable
from bilevel.nn import GeneratorMark, seeded
from tests.support.cases import joined, vector

DRAWS: dict[str, Callable[[], float]] = {
    "torch": lambda: float(torch.rand(())),
    "numpy": lambda: float(np.random.rand()),
    "numpy's normal": lambda: float(np.random.randn()),
    "python": random.random,
}


class Noisy(Problem):
    """Draws from one of the default generators, from a given pass on."""

    def __init__(self, draw: Callable[[], float] | None, after: int = 0) -> None:
        self.draw, self.left = draw, after

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        self.left -= 1
        scale = self.draw() if self.draw is not None and self.left < 0 else 1.0
        return scale * (batch * lower["y"] ** 4).sum() + (upper["x"] * lower["y"]).sum()

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return lower["y"].sum()


POINT = {"x": vector(3, 1)}, {"y": vector(3, 2)}
DRAW = Draw(torch.ones(3, dtype=torch.float64), 17)


def product(problem: Problem) -> Tensor:
    """d2G/dydy v, scaled by what the problem draws in its one pass."""
    return joined(Oracles(problem, ("y",)).lower(*POINT, POINT[1], DRAW).product)


def states() -> tuple[Any, ...]:
    _, words, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), np.asarray(words).tolist(), rest


@pytest.mark.parametrize("name", [None, *DRAWS])
def test_equal_samples_have_equal_masks_and_generators_stay(name: str | None) -> None:
    draw = None if name is None else DRAWS[name]
    np.random.seed(4)
    # One normal number in reserve.
    np.random.randn()
    before, problem = states(), Noisy(draw)
    assert draws(problem) is None
    found = [product(problem) for _ in range(3)]
    assert draws(problem) is (None if name is None else True), "nobody has asked for the upper level"
    Oracles(problem, ("y",)).upper(*POINT, DRAW)
    assert draws(problem) is (name is not None)
    assert states() == before
    with seeded(DRAW.seed):
        scale = 1.0 if draw is None else draw()
    wanted = scale * 12.0 * joined(POINT[1]) ** 3
    assert all(torch.allclose(one, wanted, rtol=1e-12) for one in found)
    assert states() == before


def test_a_problem_that_begins_to_draw_later_is_caught() -> None:
    problem, asked = Noisy(DRAWS["torch"], after=2), list[bool]()
    before = states()

    def noted(again: bool) -> Tensor:
        asked.append(again)
        return problem.lower_objective(*POINT, DRAW.batch)

    found = [repeatable(problem, "lower", DRAW.seed, noted) for _ in range(4)]
    # Two quiet passes; one that draws and is made again, and a seeded one.
    assert asked == [False, False, False, True, False]
    assert draws(problem) is True
    assert states() == before
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])
    assert torch.equal(found[2], found[3])


def test_passes_that_are_looked_at_together_are_made_again_together() -> None:
    problem, before = Noisy(DRAWS["torch"], after=2), states()
    oracles, calls = Oracles(problem, ("y",)), list[int]()

    def both() -> tuple[Tensor, Tensor]:
        calls.append(problem.left)
        above = oracles.upper(*POINT, DRAW).lower
        return joined(above), joined(oracles.lower(*POINT, POINT[1], DRAW).product)

    found = [all_repeatable(problem, both) for _ in range(4)]
    # Two that are quiet, one that draws and is made again, and a seeded one.
    assert calls == [2, 1, 0, -1, -2]
    assert draws(problem) is True
    assert states() == before
    assert all(torch.equal(found[0][0], one[0]) for one in found)
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[1][1], found[2][1])
    assert torch.equal(found[2][1], found[3][1])


def test_passes_that_are_made_again_together_know_it() -> None:
    """So that what a pass writes, such as running statistics, is written once."""
    problem, asked = Noisy(DRAWS["torch"], after=1), list[bool]()

    def noted(again: bool) -> Tensor:
        asked.append(again)
        return problem.lower_objective(*POINT, DRAW.batch)

    for level in ("upper", "lower"):
        repeatable(problem, level, DRAW.seed, lambda again: torch.zeros(()))
    problem.left = 1
    for _ in range(3):
        all_repeatable(problem, lambda: repeatable(problem, "lower", DRAW.seed, noted))
    # A quiet one, one that draws and is made again, and a seeded one.
    assert asked == [False, False, True, False]


@pytest.mark.parametrize("name", DRAWS)
def test_a_mark_notices_a_draw_and_takes_it_back(name: str) -> None:
    np.random.seed(7)
    for _ in range(3):
        mark = GeneratorMark()
        assert not mark.moved()
        first = DRAWS[name]()
        assert mark.moved()
        mark.restore()
        assert not mark.moved()
        assert DRAWS[name]() == first
