"""Every method's directions over several steps, against the papers' recursions replayed in dense algebra."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel.hypergradients import (
    BOME,
    F2SA,
    FSLA,
    MASOBA,
    MRBO,
    SABA,
    SOBA,
    SRBA,
    SUSTAIN,
    TTSA,
    AmIGO,
    Method,
    StocBiO,
)
from bilevel.hypergradients.single_loop.estimators import random_length
from bilevel.lower import Draw
from tests.support.cases import joined
from tests.support.problems.sampled_quadratic import (
    LOWER,
    PROBLEM,
    WHOLE,
    Drive,
    R,
    above,
    below,
    blocks,
    draw,
    hessian,
)

ETA = 0.4
Memory = dict[str, Any]
Triple = tuple[Tensor, Tensor, Tensor]
Found = tuple[Tensor, Tensor | None, Tensor | None]
"""D_x, D_y (None where y is not moved) and v after the step (None where none is carried)."""


def three(x: Tensor, y: Tensor, v: Tensor, lower: Draw, upper: Draw) -> Triple:
    """D_x, D_y, D_v on one sample of each level."""
    low, (f_x, f_y) = below(x, y, v, lower), above(x, y, upper)
    return f_x - low.cross, low.gradient, low.product - f_y


def soba(run: Drive, memory: Memory, lower: Sequence[Draw], upper: Sequence[Draw]) -> Found:
    d_x, d_y, d_v = three(run.x, run.y, run.v, lower[0], upper[0])
    return d_x, d_y, run.v - 0.1 * 1.5 * d_v


def ma_soba(run: Drive, memory: Memory, lower: Sequence[Draw], upper: Sequence[Draw]) -> Found:
    d_x, d_y, d_v = three(run.x, run.y, run.v, lower[0], upper[0])
    before = memory.get("h", torch.zeros_like(d_x))
    memory["h"] = 0.8 * before + 0.2 * d_x
    return before, d_y, run.v - 0.1 * d_v


def saba(run: Drive, memory: Memory, lower: Sequence[Draw], upper: Sequence[Draw]) -> Found:
    low, high = below(run.x, run.y, run.v, lower[0]), above(run.x, run.y, upper[0])
    sums = []
    for parts, sample, level in (
        ((low.gradient, low.product, low.cross), lower[0], "lower"),
        (high, upper[0], "upper"),
    ):
        count = len(run.partitions[level])
        for place, new in enumerate(parts):
            rows = memory.setdefault(f"{level} {place}", [torch.zeros_like(new) for _ in range(count)])
            sums.append(new - rows[sample.block] + sum(rows) / count)
            rows[sample.block] = new
    d_y, product, cross_v, f_x, f_y = sums
    return f_x - cross_v, d_y, run.v - 0.1 * (product - f_y)


def srba(run: Drive, memory: Memory, lower: Sequence[Draw], upper: Sequence[Draw]) -> Found:
    point = run.x, run.y, run.v
    if memory.setdefault("t", 0) % 3 == 0:
        found = three(*point, *WHOLE)
    else:
        former: Triple = memory["point"]
        pairs = zip(
            three(*point, lower[0], upper[0]), three(*former, lower[0], upper[0]), memory["direction"], strict=True
        )
        found = tuple(new - old + before for new, old, before in pairs)
    memory |= {"t": memory["t"] + 1, "point": point, "direction": found}
    return found[0], found[1], run.v - 0.1 * found[2]


def fsla(run: Drive, memory: Memory, lower: Sequence[Draw], upper: Sequence[Draw]) -> Found:
    point = run.x, run.y, run.v
    d_x, d_y, d_v = three(*point, lower[0], upper[0])
    if "point" in memory:
        eta = 0.6 / (memory["t"] + 1) ** 0.5
        former: Triple = memory["point"]
        d_x = d_x + (1 - eta) * (memory["d"] - three(*former, lower[0], upper[0])[0])
    memory |= {"t": memory.get("t", 0) + 1, "point": point, "d": d_x}
    return d_x, d_y, run.v - 0.1 * d_v


def series(f_y: Tensor, samples: Sequence[Draw]) -> Tensor:
    """eta sum_q prod_{j <= q} (I - eta H_j) f_y, products written out from the last factor to the first."""
    total = torch.zeros_like(f_y)
    for q in range(len(samples) + 1):
        term = f_y
        for sample in samples[len(samples) - q :]:
            term = term - ETA * hessian(sample) @ term
        total = total + term
    return ETA * total


def one_term(f_y: Tensor, samples: Sequence[Draw], length: int) -> Tensor:
    term = f_y
    for sample in samples[:length]:
        term = term - ETA * hessian(sample) @ term
    return ETA * (len(samples) + 1) * term


def by_series(x: Tensor, y: Tensor, lower: Sequence[Draw], upper: Sequence[Draw], length: int | None = None) -> Tensor:
    """D_x with v from a series, or from one term of it."""
    *samples, last = lower
    f_x, f_y = above(x, y, upper[0])
    v = series(f_y, samples) if length is None else one_term(f_y, samples, length)
    return f_x - below(x, y, v, last).cross


def momentum(run: Drive, memory: Memory, lower: Sequence[Draw], upper: Sequence[Draw], length: int | None) -> Found:
    point, none = (run.x, run.y), torch.zeros(R, dtype=torch.float64)
    points: list[tuple[Tensor, Tensor]] = [point, memory.get("point", point)]
    found = [(by_series(x, y, lower, upper, length), below(x, y, none, lower[-1]).gradient) for x, y in points]
    (d_x, d_y), (old_x, old_y) = found
    if "point" in memory:
        eta = 0.7 / (memory["t"] + 1) ** 0.5
        d_x = d_x + (1 - eta) * (memory["d"][0] - old_x)
        d_y = d_y + (1 - eta) * (memory["d"][1] - old_y)
    memory |= {"t": memory.get("t", 0) + 1, "point": point, "d": (d_x, d_y)}
    return d_x, d_y, None


def mrbo(run: Drive, memory: Memory, lower: Sequence[Draw], upper: Sequence[Draw]) -> Found:
    return momentum(run, memory, lower, upper, None)


def sustain(run: Drive, memory: Memory, lower: Sequence[Draw], upper: Sequence[Draw]) -> Found:
    return momentum(run, memory, lower, upper, random_length(run.step(lower, upper), 3))


def stocbio(run: Drive, memory: Memory, lower: Sequence[Draw], upper: Sequence[Draw]) -> Found:
    return by_series(run.x, run.y, lower, upper), None, None


def ttsa(run: Drive, memory: Memory, lower: Sequence[Draw], upper: Sequence[Draw]) -> Found:
    return by_series(run.x, run.y, lower, upper, random_length(run.step(lower, upper), 3)), None, None


def amigo(run: Drive, memory: Memory, lower: Sequence[Draw], upper: Sequence[Draw]) -> Found:
    f_x, f_y = above(run.x, run.y, upper[0])
    v = run.v
    for sample in lower[:-1]:
        v = v - 0.1 * 2.0 * (hessian(sample) @ v - f_y)
    return f_x - below(run.x, run.y, v, lower[-1]).cross, None, v


def f2sa(run: Drive, memory: Memory, lower: Sequence[Draw], upper: Sequence[Draw]) -> Found:
    x, y = run.x, run.y
    sigma = 2.0 + 0.5 * memory.setdefault("t", 0)
    memory["t"] += 1
    z = run.v if run.state else y[:R]
    penalised, none = torch.cat([z, y[R:]]), torch.zeros(R, dtype=torch.float64)
    at_y, at_z, (f_x, f_y) = (
        below(x, y, none, lower[0]),
        below(x, penalised, none, lower[0]),
        above(x, penalised, upper[0]),
    )
    return f_x + sigma * (at_z.upper - at_y.upper), at_y.gradient, z - 0.1 * (at_z.gradient[:R] + f_y / sigma)


def bome(run: Drive, memory: Memory, lower: Sequence[Draw], upper: Sequence[Draw]) -> Found:
    x, y, none = run.x, run.y, torch.zeros(R, dtype=torch.float64)
    ahead = y.clone()
    for _ in range(3):
        ahead[:R] -= 0.3 * below(x, ahead, none, lower[0]).gradient[:R]
    here, there = below(x, y, none, lower[0]), below(x, ahead, none, lower[0])
    nabla_f = torch.cat(above(x, y, upper[0]))
    nabla_q = torch.cat([here.upper - there.upper, here.gradient[:R]])
    multiplier = max(0.0, float((0.5 * nabla_q @ nabla_q - nabla_f @ nabla_q) / (nabla_q @ nabla_q)))
    both = nabla_f + multiplier * nabla_q
    return both[:4], torch.cat([both[4:], here.gradient[R:]]), None


Replay = Callable[[Drive, Memory, Sequence[Draw], Sequence[Draw]], Found]
CASES: dict[str, tuple[Method, Replay]] = {
    "SOBA": (SOBA(v_ratio=1.5), soba),
    "MASOBA": (MASOBA(averaging=0.2), ma_soba),
    "SABA": (SABA(), saba),
    "SRBA": (SRBA(period=3), srba),
    "FSLA": (FSLA(momentum=0.6), fsla),
    "MRBO": (MRBO(ETA, terms=3, momentum=0.7, decay=0.5), mrbo),
    "SUSTAIN": (SUSTAIN(ETA, terms=3, momentum=0.7, decay=0.5), sustain),
    "AmIGO": (AmIGO(v_steps=3, v_ratio=2.0), amigo),
    "StocBiO": (StocBiO(ETA, terms=3), stocbio),
    "TTSA": (TTSA(ETA, terms=3), ttsa),
    "F2SA": (F2SA(penalty=2.0, growth=0.5), f2sa),
    "BOME": (BOME(0.3, inner_steps=3), bome),
}


def close(found: Tensor, wanted: Tensor) -> bool:
    return float((found - wanted).norm()) <= 1e-10 * max(1.0, float(wanted.norm()))


@pytest.mark.parametrize("size", [None, 2], ids=["whole", "uneven blocks"])
@pytest.mark.parametrize("name", CASES)
def test_directions_are_those_of_the_recursion(name: str, size: int | None) -> None:
    method, replay = CASES[name]
    run = Drive(method, {level: blocks(level, size) for level in ("lower", "upper")})
    memory: Memory = {}
    numbers = torch.Generator().manual_seed(3)
    lower, upper = run.partitions["lower"], run.partitions["upper"]
    for t in range(8):
        drawn = [draw(lower, int(k)) for k in torch.randint(len(lower), (method.lower_draws,), generator=numbers)]
        drawn_above = [draw(upper, int(k)) for k in torch.randint(len(upper), (method.upper_draws,), generator=numbers)]
        d_x, d_y, v = replay(run, memory, drawn, drawn_above)
        proposal = run.propose(drawn, drawn_above)
        assert close(joined(proposal.gradient), d_x), (t, "x")
        assert (proposal.lower_gradient is None) == (d_y is None) == (not method.moves_lower)
        if d_y is not None and proposal.lower_gradient is not None:
            assert close(joined(proposal.lower_gradient), d_y), (t, "y")
        if v is not None:
            assert close(joined(proposal.state["v"]), v), (t, "v")
        value = PROBLEM.upper_objective(run.upper, run.lower, drawn_above[0].batch) * drawn_above[0].weight
        if name not in ("SRBA", "F2SA"):
            assert float(proposal.loss) == pytest.approx(float(value), rel=1e-12)
        if proposal.result is not None:
            assert proposal.result.failure is None
            assert torch.equal(joined(proposal.result.grad), joined(proposal.gradient))
            parts = joined(proposal.result.direct) + joined(proposal.result.implicit)
            assert close(parts, joined(proposal.gradient))
        run.advance(proposal)


@pytest.mark.parametrize("name", ["SOBA", "SABA", "SRBA", "FSLA"])
def test_on_the_whole_set_the_directions_are_the_full_ones(name: str) -> None:
    """Variance reduction and momentum change nothing where there is no noise."""
    run = Drive(CASES[name][0], {level: blocks(level, None) for level in ("lower", "upper")})
    for _ in range(5):
        d_x, d_y, _ = three(run.x, run.y, run.v, *WHOLE)
        proposal = run.propose(WHOLE[:1], WHOLE[1:])
        assert close(joined(proposal.gradient), d_x)
        assert proposal.lower_gradient is not None
        assert close(joined(proposal.lower_gradient), d_y)
        run.advance(proposal)


def test_the_sum_of_all_blocks_is_the_whole_whatever_batches_it_is_swept_in() -> None:
    lower, upper = blocks("lower"), blocks("upper")
    lower.sweep_size = 3
    run = Drive(SRBA(period=1), {"lower": lower, "upper": upper})
    assert [len(batch) for batch, _ in lower.sweep()] == [3, 3, 1]
    d_x, d_y, _ = three(run.x, run.y, run.v, *WHOLE)
    proposal = run.propose([draw(lower, 1)], [draw(upper, 2)])
    assert close(joined(proposal.gradient), d_x)
    assert proposal.lower_gradient is not None
    assert close(joined(proposal.lower_gradient), d_y)
    assert sum(lower.weight(k) for k in range(len(lower))) == pytest.approx(len(lower))
    assert len(torch.cat([lower.block(k) for k in range(len(lower))])) == LOWER
