"""Passes are seeded only where a problem draws, and generators are left as they were found."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bilevel import Params, Problem
from bilevel.lower import Draw, Oracles, repeatable
from bilevel.nn import GeneratorMark
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


def compute(problem: Problem) -> Callable[[bool], Tensor]:
    def passes(seeded: bool) -> Tensor:
        oracles = Oracles(problem, ("y",), seeded=seeded)
        parts = [oracles.lower(*POINT, POINT[1], DRAW) for _ in range(2)]
        assert not seeded or torch.equal(joined(parts[0].product), joined(parts[1].product)), "equal masks"
        return joined(parts[0].product)

    return passes


def probe(problem: Problem) -> Callable[[], Any]:
    return lambda: problem.lower_objective(*POINT, DRAW.batch)


def states() -> tuple[Any, ...]:
    _, words, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), np.asarray(words).tolist(), rest


@pytest.mark.parametrize("name", [None, *DRAWS])
def test_seeded_and_unseeded_give_the_same_and_generators_stay(name: str | None) -> None:
    draw = None if name is None else DRAWS[name]
    np.random.seed(4)
    # One normal number in reserve.
    np.random.randn()
    before = states()
    problem = Noisy(draw)
    found = [repeatable(problem, compute(problem), probe(problem)) for _ in range(3)]
    assert states() == before
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0], compute(Noisy(draw))(True))
    assert states() == before


def test_a_problem_that_begins_to_draw_later_is_caught() -> None:
    problem, asked = Noisy(DRAWS["torch"], after=4), list[bool]()
    before = states()

    def noted(seeded: bool) -> Tensor:
        asked.append(seeded)
        return compute(problem)(seeded)

    found = [repeatable(problem, noted, probe(problem)) for _ in range(3)]
    # A probe and two passes, one quiet and one drawing pass that are made again, and two seeded ones.
    assert asked == [False, False, True, True]
    assert states() == before
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


def test_a_problem_is_probed_once() -> None:
    problem, probes = Noisy(None), list[int]()
    for _ in range(3):
        repeatable(problem, compute(problem), lambda: probes.append(1))
    assert probes == [1]
    repeatable(Noisy(None), compute(problem), lambda: probes.append(1))
    assert probes == [1, 1]


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
