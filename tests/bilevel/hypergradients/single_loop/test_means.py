"""The mean of each direction over all its samples, enumerated: what theory says it is."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel.hypergradients import FSLA, MASOBA, MRBO, SABA, SOBA, SRBA, SUSTAIN, TTSA, Method, Proposal, StocBiO
from bilevel.hypergradients.single_loop import estimators
from bilevel.hypergradients.single_loop.estimators import random_length
from bilevel.lower import Draw
from tests.bilevel.hypergradients.single_loop.test_directions import by_series, close, one_term, series, three
from tests.support.cases import joined
from tests.support.problems.sampled_quadratic import WHOLE, Drive, R, above, below, blocks, cross, draw, hessian

ETA, TERMS = 0.4, 2


def combinations(run: Drive) -> Iterator[tuple[list[Draw], list[Draw]]]:
    """Every choice of blocks for a step's samples."""
    lower, upper = run.partitions["lower"], run.partitions["upper"]
    below_them = product(range(len(lower)), repeat=run.method.lower_draws)
    for low, high in product(below_them, range(len(upper))):
        yield [draw(lower, k) for k in low], [draw(upper, high)]


@dataclass
class Mean:
    """The mean of proposals."""

    x: Tensor
    y: Tensor | None
    v: Tensor | None

    @staticmethod
    def of(proposals: list[Proposal]) -> "Mean":
        def mean(parts: list[Any]) -> Tensor:
            return torch.stack([joined(part) for part in parts]).mean(0)

        moves = proposals[0].lower_gradient is not None
        carried = bool(proposals[0].state.get("v"))
        return Mean(
            mean([p.gradient for p in proposals]),
            mean([p.lower_gradient for p in proposals]) if moves else None,
            mean([p.state["v"] for p in proposals]) if carried else None,
        )


def mean_of(run: Drive) -> Mean:
    return Mean.of([run.propose(*samples) for samples in combinations(run)])


def warmed(method: Method, steps: int = 5) -> Drive:
    """After some steps on scattered samples."""
    run = Drive(method, {level: blocks(level, 3) for level in ("lower", "upper")})
    numbers = torch.Generator().manual_seed(5)
    for _ in range(steps):
        low, high = (
            [draw(source, int(k)) for k in torch.randint(len(source), (count,), generator=numbers)]
            for source, count in ((run.partitions["lower"], method.lower_draws), (run.partitions["upper"], 1))
        )
        run.advance(run.propose(low, high))
    return run


@pytest.mark.parametrize("method", [SOBA(), SABA()], ids=["SOBA", "SABA"])
def test_stochastic_directions_and_those_with_tables_are_unbiased(method: Method) -> None:
    run = warmed(method, 6)
    d_x, d_y, d_v = three(run.x, run.y, run.v, *WHOLE)
    found = mean_of(run)
    assert close(found.x, d_x)
    assert found.y is not None
    assert close(found.y, d_y)
    assert found.v is not None
    assert close(found.v, run.v - 0.1 * d_v)
    one = run.propose([draw(run.partitions["lower"], 0)], [draw(run.partitions["upper"], 0)])
    assert not close(joined(one.gradient), d_x), "a single sample has noise"


def whole_series(f_y: Tensor) -> Tensor:
    """The series of the whole set's Hessian."""
    return series(f_y, [WHOLE[0]] * TERMS)


@pytest.mark.parametrize("name", ["StocBiO", "TTSA", "SUSTAIN", "MRBO"])
def test_sampled_series_have_the_mean_of_the_whole_sets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {"StocBiO": StocBiO, "TTSA": TTSA, "SUSTAIN": SUSTAIN, "MRBO": MRBO}
    run = Drive(kinds[name](ETA, terms=TERMS), {level: blocks(level, 3) for level in ("lower", "upper")})
    f_x, f_y = above(run.x, run.y, WHOLE[1])
    wanted = f_x - cross() @ whole_series(f_y)
    proposals = []
    for length in range(TERMS + 1) if name in ("TTSA", "SUSTAIN") else (0,):
        monkeypatch.setattr(estimators, "random_length", lambda step, terms, length=length: length)
        proposals += [run.propose(*samples) for samples in combinations(run)]
    found = Mean.of(proposals)
    assert close(found.x, wanted)
    if found.y is not None:
        assert close(found.y, below(run.x, run.y, torch.zeros(R).double(), WHOLE[0]).gradient)


def test_the_whole_sets_series_is_as_near_to_the_inverse_as_the_docstring_says() -> None:
    f_y = above(torch.ones(4).double(), torch.ones(7).double(), WHOLE[1])[1]
    H = hessian()
    least, largest = float(torch.linalg.eigvalsh(H)[0]), float(torch.linalg.eigvalsh(H)[-1])
    assert 2 / largest > ETA
    for terms in (1, 5, 20):
        error = series(f_y, [WHOLE[0]] * terms) - torch.linalg.solve(H, f_y)
        assert float(error.norm()) <= (1 - ETA * least) ** (terms + 1) / least * float(f_y.norm())
    one = torch.stack([one_term(f_y, [WHOLE[0]] * 5, k) for k in range(6)]).mean(0)
    assert close(one, series(f_y, [WHOLE[0]] * 5))


def test_recursive_estimates_drift_by_the_full_difference() -> None:
    """E d_t = D(z_t) + (1 - eta)(d_{t-1} - D(z_{t-1})): exact wherever the former estimate was."""
    for method in (SRBA(period=4), FSLA(momentum=0.6), MRBO(ETA, terms=TERMS, momentum=0.7, decay=0.5)):
        run = warmed(method, 6)
        eta = {"SRBA": 0.0, "FSLA": 0.6 / 7**0.5, "MRBO": 0.7 / 7**0.5}[type(method).__name__]
        old, before = run.state["point"], run.state["direction"]
        old_x, old_y, old_v = (joined(old[name]) if old[name] else run.v for name in ("upper", "lower", "v"))
        if isinstance(method, MRBO):
            full = [by_series(x, y, [WHOLE[0]] * 3, WHOLE[1:]) for x, y in ((run.x, run.y), (old_x, old_y))]
            former = joined(before["upper"])
        else:
            full = [three(*at, *WHOLE)[0] for at in ((run.x, run.y, run.v), (old_x, old_y, old_v))]
            former = joined(before if isinstance(method, FSLA) else before["upper"])
        found = mean_of(run)
        assert close(found.x, full[0] + (1 - eta) * (former - full[1]))
        assert not close(found.x, full[0])


def test_the_moving_average_moves_towards_the_full_direction() -> None:
    run = warmed(MASOBA(averaging=0.3))
    d_x = three(run.x, run.y, run.v, *WHOLE)[0]
    averages = [joined(run.propose(*samples).state["average"]) for samples in combinations(run)]
    assert close(torch.stack(averages).mean(0), 0.7 * joined(run.state["average"]) + 0.3 * d_x)


def test_random_lengths_are_uniform_and_functions_of_step_and_samples() -> None:
    run = Drive(TTSA(ETA, terms=3))
    lower, upper = run.partitions["lower"], run.partitions["upper"]
    lengths: list[int] = []
    for number in range(1, 4001):
        run.number = number
        step = run.step([draw(lower, number % 4)] * 4, [draw(upper, 0)])
        lengths.append(random_length(step, 3))
        assert lengths[-1] == random_length(step, 3)
    counts = Counter(lengths)
    assert sorted(counts) == [0, 1, 2, 3]
    # 1000 each, with a standard deviation of 27.
    assert all(850 < count < 1150 for count in counts.values())
    follows = Counter(pairwise(lengths))
    assert all(170 < count < 330 for count in follows.values()), "250 each of the 16 pairs, with a deviation of 15"
    assert len({random_length(run.step([draw(lower, k)] * 4, [draw(upper, 0)]), 1000) for k in range(4)}) == 4


def test_blocks_have_the_uneven_weights_that_make_their_mean_the_whole() -> None:
    lower = blocks("lower")
    weights = [lower.weight(k) for k in range(len(lower))]
    assert weights == pytest.approx([8 / 7, 8 / 7, 8 / 7, 4 / 7])
    mean = torch.stack([hessian(draw(lower, k)) for k in range(4)]).mean(0)
    assert close(mean, hessian())
