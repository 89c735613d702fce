"""The contestants: this package's hypergradients, and those of TorchOpt and Betty, on the same alternation.

Each makes 20 lower steps (SGD, momentum 0.9) and one upper step (Adam) an alternation, from the same starts. A single
loop makes 20 steps of both levels together instead, with a twentieth of the upper rate for each.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from benchmarks.peers.adapters import quiet
from benchmarks.race.problems import Batch, Race, Rates
from bilevel import (
    CG,
    AlternatingSchedule,
    Implicit,
    Level,
    Method,
    OneStep,
    Params,
    Penalty,
    Problem,
    SGDUpdate,
    Trainer,
    Unrolled,
)
from bilevel.hypergradients import SABA, SAMA, SOBA, SingleLoop
from bilevel.linear import Nystrom, Solver
from bilevel.products import ReverseOverReverse
from bilevel.training import BatchSource, Blocks

LOWER_STEPS, PENALIZED_STEPS, MOMENTUM = 20, 5, 0.9
SOLVER_ITERATIONS, SOLVER_RTOL = 20, 1e-2

Draw = Callable[[Generator], Batch]


class Contestant(ABC):
    """A run in progress."""

    @property
    @abstractmethod
    def upper(self) -> Tensor:
        """x as it is now."""

    @abstractmethod
    def advance(self) -> None:
        """One alternation: the lower steps and an upper step."""


class RaceProblem(Problem):
    def __init__(self, race: Race) -> None:
        self.race = race

    def lower_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        return self.race.lower_loss(upper["x"], lower["y"], batch)

    def upper_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        return self.race.upper_loss(upper["x"], lower["y"], batch)


class Draws(BatchSource):
    """Batches from a generator that both levels share; its state is where the stream stands."""

    def __init__(self, draw: Draw, generator: Generator) -> None:
        self.draw, self.generator = draw, generator

    def begin_stage(self, steps: int) -> None:
        return None

    def next(self) -> Batch:
        return self.draw(self.generator)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.generator.set_state(state["generator"])


class Own(Contestant):
    """This package: a `Trainer` with one of its methods."""

    def __init__(self, race: Race, rates: Rates, generator: Generator, method: Method) -> None:
        self.x, y = (start.clone().requires_grad_() for start in (race.upper, race.lower))
        single = isinstance(method, SingleLoop)
        adam = torch.optim.Adam([self.x], lr=rates.upper / LOWER_STEPS if single else rates.upper)
        sgd = torch.optim.SGD([y], lr=rates.lower, momentum=MOMENTUM)
        above, below = self._blocks(race, generator) if single else self._draws(race, generator)
        # How many alternations are made is for the race's clock to say.
        schedule = AlternatingSchedule(1, 0, LOWER_STEPS) if single else AlternatingSchedule(1, LOWER_STEPS, 1)
        upper, lower = Level({"x": self.x}, adam, above), Level({"y": y}, sgd, below)
        self.trainer = Trainer(RaceProblem(race), upper, lower, schedule, method, on_failure="ignore")

    @staticmethod
    def _draws(race: Race, generator: Generator) -> tuple[BatchSource, BatchSource]:
        return Draws(race.upper_batch, generator), Draws(race.lower_batch, generator)

    @staticmethod
    def _blocks(race: Race, generator: Generator) -> tuple[BatchSource, BatchSource]:
        """Batches of the same size, of rows that are drawn without replacement and stay together."""

        def blocks(rows: Batch) -> Blocks:
            count = len(rows[0])
            seed = int(torch.randint(2**31, (), generator=generator))
            return Blocks(count, race.batch_size or count, lambda chosen: tuple(t[chosen] for t in rows), seed=seed)

        return blocks(race.upper_rows), blocks(race.lower_rows)

    @property
    def upper(self) -> Tensor:
        return self.x

    def advance(self) -> None:
        self.trainer.advance()


def implicit_cg(race: Race, rates: Rates) -> Method:
    return _implicit(race, CG(SOLVER_ITERATIONS, SOLVER_RTOL))


def implicit_nystrom(race: Race, rates: Rates) -> Method:
    return _implicit(race, Nystrom(10, max_refinements=SOLVER_ITERATIONS, rtol=SOLVER_RTOL))


def _implicit(race: Race, solver: Solver) -> Method:
    hvp = ReverseOverReverse(keep_graph=True)
    return Implicit(solver, hvp=hvp, hessian_batches=race.batches, warm_start=True)


def unrolled(race: Race, rates: Rates) -> Method:
    """Through the last ten of the alternation's steps."""
    return Unrolled(steps=LOWER_STEPS // 2)


def penalty(race: Race, rates: Rates) -> Method:
    """The penalised copy makes five steps of its own, on the first five batches of the alternation."""
    return Penalty(SGDUpdate(rates.lower, MOMENTUM), penalty=10.0, lower_batches=PENALIZED_STEPS)


def sama(race: Race, rates: Rates) -> Method:
    return SAMA(hvp=ReverseOverReverse(), lower_batches=race.batches)


def one_step(race: Race, rates: Rates) -> Method:
    """DARTS; its virtual step is as long as the lower optimizer's."""
    return OneStep(hvp=ReverseOverReverse(), lower_batches=race.batches)


def soba(race: Race, rates: Rates) -> Method:
    return SOBA()


def saba(race: Race, rates: Rates) -> Method:
    """Where a batch is the whole set, SOBA with a table that changes nothing."""
    return SABA()


class TorchOptAlternation(Contestant):
    """Torch optimizers at both levels around a `direction`, which makes the lower steps and gives the hypergradient."""

    def __init__(self, race: Race, rates: Rates, generator: Generator) -> None:
        self.race, self.rates, self.generator = race, rates, generator
        self.x, self.y = (start.clone().requires_grad_() for start in (race.upper, race.lower))
        self.lower_optimizer = torch.optim.SGD([self.y], lr=rates.lower, momentum=MOMENTUM)
        self.upper_optimizer = torch.optim.Adam([self.x], lr=rates.upper)

    @property
    def upper(self) -> Tensor:
        return self.x

    @abstractmethod
    def direction(self) -> Tensor:
        """The hypergradient, after the lower steps."""

    def advance(self) -> None:
        self.x.grad = self.direction()
        self.upper_optimizer.step()

    def lower_batches(self, count: int) -> list[Batch]:
        return [self.race.lower_batch(self.generator) for _ in range(count)]


class TorchOptImplicit(TorchOptAlternation):
    """custom_root around y with solve_cg; starts every solve from 0, which is all it offers."""

    def direction(self) -> Tensor:
        for batch in self.lower_batches(LOWER_STEPS):
            self.lower_optimizer.zero_grad()
            (self.y.grad,) = torch.autograd.grad(self.race.lower_loss(self.x.detach(), self.y, batch), self.y)
            self.lower_optimizer.step()
        package = importlib.import_module("torchopt")
        batches = self.lower_batches(self.race.batches)

        def objective(y: Tensor, x: Tensor) -> Tensor:
            return torch.stack([self.race.lower_loss(x, y, batch) for batch in batches]).mean()

        def gradient(y: Tensor, x: Tensor) -> Tensor:
            return torch.func.grad(objective)(y, x)

        solve = package.linear_solve.solve_cg(maxiter=SOLVER_ITERATIONS, rtol=SOLVER_RTOL)

        @package.diff.implicit.custom_root(gradient, argnums=1, solve=solve)
        def solution(y: Tensor, x: Tensor) -> Tensor:
            return y

        loss = self.race.upper_loss(self.x, solution(self.y.detach(), self.x), self.race.upper_batch(self.generator))
        return torch.autograd.grad(loss, self.x)[0]


class TorchOptUnrolled(TorchOptAlternation):
    """Differentiates through all of its lower steps, which begin without momentum; it offers no truncation."""

    def direction(self) -> Tensor:
        package = importlib.import_module("torchopt")
        optimizer = package.sgd(self.rates.lower, MOMENTUM, moment_requires_grad=True)
        y = (self.y.detach().requires_grad_(),)
        state = optimizer.init(y)
        for batch in self.lower_batches(LOWER_STEPS):
            loss = self.race.lower_loss(self.x, y[0], batch)
            updates, state = optimizer.update(torch.autograd.grad(loss, y, create_graph=True), state, inplace=False)
            y = package.apply_updates(y, updates, inplace=False)
        value = self.race.upper_loss(self.x, y[0], self.race.upper_batch(self.generator))
        (gradient,) = torch.autograd.grad(value, self.x)
        with torch.no_grad():
            self.y.copy_(y[0])
        return gradient


@dataclass
class Endless:
    """Batches without an end, as Betty's loader."""

    draw: Draw
    generator: Generator

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.draw(self.generator)


class Betty(Contestant):
    """Two ImplicitProblems in an Engine; its systems are those of the last lower batch."""

    kind = "cg"

    def __init__(self, race: Race, rates: Rates, generator: Generator) -> None:
        problems, configs = (importlib.import_module(f"betty.{name}") for name in ("problems", "configs"))
        engine = importlib.import_module("betty.engine")

        class Upper(problems.ImplicitProblem):
            def training_step(self, batch: Batch) -> Tensor:
                return race.upper_loss(self.module[0], self.lower.module[0], batch)

        class Lower(problems.ImplicitProblem):
            def training_step(self, batch: Batch) -> Tensor:
                return race.lower_loss(self.upper.module[0], self.module[0], batch)

        self.x, y = (nn.ParameterList([start.clone()]) for start in (race.upper, race.lower))
        config = configs.Config(
            type=self.kind,
            unroll_steps=LOWER_STEPS,
            cg_iterations=SOLVER_ITERATIONS,
            neumann_iterations=SOLVER_ITERATIONS,
            neumann_alpha=rates.lower,
        )
        above, below = (Endless(draw, generator) for draw in (race.upper_batch, race.lower_batch))
        adam = torch.optim.Adam(self.x.parameters(), lr=rates.upper)
        sgd = torch.optim.SGD(y.parameters(), lr=rates.lower, momentum=MOMENTUM)
        upper = Upper("upper", configs.Config(retain_graph=True), self.x, adam, None, above, race.upper.device)
        lower = Lower("lower", config, y, sgd, None, below, race.upper.device)
        dependencies = {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}
        with quiet():
            self.engine = engine.Engine([upper, lower], configs.EngineConfig(), dependencies)
        self.engine.train()

    @property
    def upper(self) -> Tensor:
        return self.x[0]

    def advance(self) -> None:
        for _ in range(LOWER_STEPS):
            self.engine.train_step()


class BettyNeumann(Betty):
    kind = "neumann"


class BettyDarts(Betty):
    kind = "darts"


@dataclass(frozen=True)
class Entry:
    """`distribution` is the package's name for pip, "" for this one."""

    name: str
    distribution: str
    start: Callable[[Race, Rates, Generator], Contestant]


def own(name: str, method: Callable[[Race, Rates], Method]) -> Entry:
    """An entry of this package; `method` makes the value that its `Trainer` takes."""
    return Entry(name, "", lambda race, rates, generator: Own(race, rates, generator, method(race, rates)))


ENTRIES: tuple[Entry, ...] = (
    own("implicit, CG, warm start", implicit_cg),
    own("implicit, Nystrom", implicit_nystrom),
    own("unrolled, last 10 steps", unrolled),
    own("penalty (F2SA)", penalty),
    own("SAMA", sama),
    own("one virtual step (DARTS)", one_step),
    own("single loop, SOBA", soba),
    own("single loop, SABA", saba),
    Entry("TorchOpt, implicit CG", "torchopt", TorchOptImplicit),
    Entry("TorchOpt, unrolled", "torchopt", TorchOptUnrolled),
    Entry("Betty, CG", "betty-ml", Betty),
    Entry("Betty, Neumann", "betty-ml", BettyNeumann),
    Entry("Betty, DARTS", "betty-ml", BettyDarts),
)
