"""What one upper step on one-sample batches costs beside hand-written oracles, which do nothing but differentiate.

    python benchmarks/small_steps.py --threads 1 --json benchmarks/results/small_steps.json --docs docs/cost.md

The hand-written oracles are what a stochastic single-loop method needs of one sample a level: one forward pass and one
double backward pass below for dG/dy, the Hessian product and the cross term, one forward and one backward pass above.
Every other row computes a hypergradient, or makes a step, by this package on the same batches. All rows are timed in
turn within one run, in processor seconds; a figure is the row's over those of the oracles, repeat by repeat.

A row is a function of a `Case` in `ROWS` that returns what is to be timed: one step, called again and again.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks.measuring import Timing, environment, parser, show, use_threads, write_json
from benchmarks.pages import conditions, table, update
from bilevel import (
    CG,
    AlternatingSchedule,
    Identity,
    Implicit,
    Level,
    Neumann,
    Params,
    Problem,
    Trainer,
    hypergradient,
    linearize,
)
from bilevel.hypergradients import SOBA, Draw, SingleLoop, UpperStep
from bilevel.linear import Solver
from bilevel.products import ReverseOverReverse

Batch = tuple[Tensor, ...]
Loss = Callable[[Tensor, Tensor, Batch], Tensor]
Step = Callable[[], object]

CALLS, REPEATS = 10, 61
STAGE = CALLS
"""Steps of a `Trainer` that are timed together: one stage."""
RATE = 0.1
SAMPLES = 64
SCALE = 0.1
"""Of the Neumann series: its automatic choice takes five more products."""


class CaseProblem(Problem):
    """The case's losses on variables named x and y."""

    def __init__(self, lower_loss: Loss, upper_loss: Loss) -> None:
        self.lower_loss, self.upper_loss = lower_loss, upper_loss

    def lower_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        return self.lower_loss(upper["x"], lower["y"], batch)

    def upper_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        return self.upper_loss(upper["x"], lower["y"], batch)


@dataclass(frozen=True)
class Case:
    """A bilevel problem with one tensor a level, and batches of one sample of both levels."""

    name: str
    problem: CaseProblem
    x: Tensor
    y: Tensor
    v: Tensor
    lower: tuple[Batch, ...]
    upper: tuple[Batch, ...]

    def batches(self) -> Callable[[], tuple[Batch, Batch]]:
        """Gives the next pair of a lower and an upper batch, again and again."""
        place = -1

        def following() -> tuple[Batch, Batch]:
            nonlocal place
            place = (place + 1) % SAMPLES
            return self.lower[place], self.upper[place]

        return following


def quadratic(size: int = 100) -> Case:
    """Per-sample quadratics ``1/2 z'A_i z + b_i'z`` of z = (x, y), with x and y of `size` entries."""
    generator = torch.Generator().manual_seed(0)

    def samples() -> tuple[Batch, ...]:
        rows = torch.randn(SAMPLES, size, 2 * size, generator=generator) / size**0.5
        matrices, slopes = rows.mT @ rows, torch.randn(SAMPLES, 2 * size, generator=generator)
        return tuple((matrices[i : i + 1].clone(), slopes[i : i + 1].clone()) for i in range(SAMPLES))

    def loss(x: Tensor, y: Tensor, batch: Batch) -> Tensor:
        z = torch.cat([x, y])
        return (0.5 * ((batch[0] @ z) @ z) + batch[1] @ z).mean()

    x, y, v = (torch.randn(size, generator=generator) for _ in range(3))
    return Case("quadratic", CaseProblem(loss, loss), x, y, v, samples(), samples())


def logistic(features: int = 22) -> Case:
    """Logistic regression with a penalty ``exp(x_j)`` for each feature."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(features, generator=generator)

    def samples() -> tuple[Batch, ...]:
        rows = torch.randn(SAMPLES, 1, features, generator=generator)
        signs = torch.sign(rows @ weights + 0.3 * torch.randn(SAMPLES, 1, generator=generator))
        return tuple((rows[i].clone(), signs[i].clone()) for i in range(SAMPLES))

    def lower_loss(x: Tensor, y: Tensor, batch: Batch) -> Tensor:
        return softplus(-batch[1] * (batch[0] @ y)).mean() + 0.5 * (x.exp() * y.square()).sum()

    def upper_loss(x: Tensor, y: Tensor, batch: Batch) -> Tensor:
        return softplus(-batch[1] * (batch[0] @ y)).mean()

    x, y, v = -torch.ones(features), weights.clone(), torch.randn(features, generator=generator)
    return Case("logistic regression", CaseProblem(lower_loss, upper_loss), x, y, v, samples(), samples())


def oracles(case: Case) -> Step:
    """Written by hand in torch: what every other row is a multiple of."""
    following, problem, v = case.batches(), case.problem, case.v

    def step() -> object:
        below, above = following()
        x, y = case.x.detach().requires_grad_(), case.y.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(problem.lower_loss(x, y, below), y, create_graph=True)
        product, cross = torch.autograd.grad(gradient, (y, x), v)
        direct, slope = torch.autograd.grad(problem.upper_loss(x, y, above), (x, y), allow_unused=True)
        return gradient, product, cross, direct, slope

    return step


def by(solver: Solver) -> Callable[[Case], Step]:
    """`hypergradient` by one solver."""

    def row(case: Case) -> Step:
        following, method = case.batches(), Implicit(solver, hvp=ReverseOverReverse(keep_graph=True))

        def step() -> object:
            below, above = following()
            return hypergradient(
                case.problem,
                {"x": case.x},
                {"y": case.y},
                method,
                upper_batch=above,
                lower_batches=[below],
                on_failure="ignore",
            )

        return step

    return row


def from_a_start(solver: Solver) -> Callable[[Case], Step]:
    """`linearize` and `System.hypergradient` with a first iterate."""

    def row(case: Case) -> Step:
        following, provider = case.batches(), ReverseOverReverse(keep_graph=True)

        def step() -> object:
            below, above = following()
            system = linearize(case.problem, {"x": case.x}, {"y": case.y}, [below], solver=solver, hvp=provider)
            return system.hypergradient(above, x0={"y": case.v}, on_failure="ignore")

        return step

    return row


def frame(method: SingleLoop) -> Callable[[Case], Step]:
    """A single-loop method's directions, without the levels' optimizers."""

    def row(case: Case) -> Step:
        following, state = case.batches(), {"v": {"y": case.v}}

        def step() -> object:
            below, above = following()
            at = UpperStep(
                case.problem,
                {"x": case.x},
                {"y": case.y},
                above,
                (),
                lower_rate=RATE,
                # In the first one a problem is examined.
                number=2,
                lower_draws=(Draw(below, 0),),
                upper_draws=(Draw(above, 1),),
            )
            return method.propose(at, state, None)

        return step

    return row


def trainer(method: SingleLoop) -> Callable[[Case], Step]:
    """A whole step of a `Trainer` without callbacks: batches, directions, both optimizers, and the record. The steps
    lead nowhere: the rate is 0."""

    def row(case: Case) -> Step:
        x, y = case.x.clone().requires_grad_(), case.y.clone().requires_grad_()
        upper = Level({"x": x}, torch.optim.SGD([x], lr=0.0), list(case.upper))
        lower = Level({"y": y}, torch.optim.SGD([y], lr=0.0), list(case.lower))
        return Trainer(case.problem, upper, lower, AlternatingSchedule(10**9, 0, STAGE), method).advance

    return row


ORACLES = "hand-written oracles"
TRAINER = "step of a Trainer, SOBA"
ROWS: dict[str, Callable[[Case], Step]] = {
    ORACLES: oracles,
    "directions, SOBA": frame(SOBA()),
    TRAINER: trainer(SOBA()),
    "hypergradient, Identity()": by(Identity()),
    "hypergradient, Neumann(1)": by(Neumann(1, scale=SCALE)),
    "hypergradient, Neumann(1), from a start": from_a_start(Neumann(1, scale=SCALE)),
    "hypergradient, CG(1)": by(CG(1, None)),
}


def repeated(step: Step, calls: int) -> Step:
    def several() -> None:
        for _ in range(calls):
            step()

    return several


def processor_seconds(steps: Mapping[str, Step], repeats: int) -> dict[str, Timing]:
    """Of each, all of them once in every repeat, after a round that does not count; other work on the machine disturbs
    them less than seconds of the clock."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(-1, repeats):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if repeat >= 0:
                samples[name].append(time.process_time() - start)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def measure(*, quick: bool) -> dict[str, Any]:
    """Milliseconds of the oracles and multiples of them, by case and row."""
    calls, repeats = CALLS, 2 if quick else REPEATS
    cases = {}
    for case in (quadratic(), logistic()):
        steps = {name: repeated(row(case), 1 if name == TRAINER else calls) for name, row in ROWS.items()}
        times = processor_seconds(steps, repeats)
        ratios = {name: timing.over(times[ORACLES]).record() for name, timing in times.items() if name != ORACLES}
        cases[case.name] = {"milliseconds": 1e3 * times[ORACLES].median / calls, "ratios": ratios}
    return {"quick": quick, "environment": environment(), "calls": calls, "repeats": repeats, "cases": cases}


def rows(figures: Mapping[str, Any]) -> list[list[str]]:
    """One a row of `ROWS`; median and quartiles for each case."""
    cases = list(figures["cases"].values())
    times = [ORACLES, *(f"{case['milliseconds']:.2f} ms" for case in cases)]
    names = list(cases[0]["ratios"])
    return [times, *([name, *(_spread(case["ratios"][name]) for case in cases)] for name in names)]


def _spread(row: Mapping[str, float]) -> str:
    return f"{row['median']:.2f} ({row['q1']:.2f} to {row['q3']:.2f})"


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """The table of the page."""
    return {"small steps": f"{table(['one step', *figures['cases']], rows(figures))}\n\n{conditions(figures)}"}


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--docs", type=Path, help="write the table into this page")
    options.add_argument("--from", type=Path, dest="source", help="take figures from this file instead of measuring")
    given = options.parse_args(arguments)
    if given.device.type != "cpu":
        options.error("steps on one sample are too small for an accelerator: leave --device out")
    use_threads(given.threads)
    kept: Path | None = given.source
    figures = measure(quick=given.quick) if kept is None else json.loads(kept.read_text(encoding="utf-8"))
    write_json(given.json, figures)
    show("One step on one-sample batches", ["one step", *figures["cases"]], rows(figures))
    return 0 if given.docs is None else update(given.docs, tables(figures), check=False)


if __name__ == "__main__":
    sys.exit(main())
