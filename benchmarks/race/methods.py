"""The contestants: this package's hypergradients, and those of TorchOpt and Betty, on the same alternation.

Each makes 20 lower steps (SGD, momentum 0.9) and one upper step (Adam) an alternation, from the same starts.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from benchmarks.peers.adapters import quiet
from benchmarks.race.problems import Batch, Race, Rates
from bilevel import CG, Hypergradient, Nystrom, Params, Problem, SGDUpdate, hypergradient, unrolled_hypergradient
from bilevel.hypergradients import darts_hypergradient, from_optimizer, penalty_hypergradient, sama_hypergradient
from bilevel.linear import Solver
from bilevel.products import ReverseOverReverse

LOWER_STEPS, PENALIZED_STEPS, MOMENTUM = 20, 5, 0.9
SOLVER_ITERATIONS, SOLVER_RTOL = 20, 1e-2


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


class Alternation(Contestant):
    """Torch optimizers at both levels around a `direction`, which gives the hypergradient and may move y itself."""

    def __init__(self, race: Race, rates: Rates, generator: Generator) -> None:
        self.race, self.rates, self.generator, self.problem = race, rates, generator, RaceProblem(race)
        self.x, self.y = (start.clone().requires_grad_() for start in (race.upper, race.lower))
        self.lower_optimizer = torch.optim.SGD([self.y], lr=rates.lower, momentum=MOMENTUM)
        self.upper_optimizer = torch.optim.Adam([self.x], lr=rates.upper)

    @property
    def upper(self) -> Tensor:
        return self.x

    @abstractmethod
    def direction(self) -> Tensor:
        """The hypergradient, after as many lower steps as it makes itself."""

    def advance(self) -> None:
        self.x.grad = self.direction()
        self.upper_optimizer.step()

    def lower_batches(self, count: int) -> list[Batch]:
        return [self.race.lower_batch(self.generator) for _ in range(count)]

    def descend(self) -> None:
        for batch in self.lower_batches(LOWER_STEPS):
            self.lower_optimizer.zero_grad()
            (self.y.grad,) = torch.autograd.grad(self.race.lower_loss(self.x.detach(), self.y, batch), self.y)
            self.lower_optimizer.step()

    def arguments(self) -> dict[str, Any]:
        """What every hypergradient of this package takes besides its own options."""
        return {
            "problem": self.problem,
            "upper": {"x": self.x},
            "lower": {"y": self.y},
            "upper_batch": self.race.upper_batch(self.generator),
            "lower_batches": self.lower_batches(self.race.batches),
            "on_failure": "ignore",
        }


class Implicit(Alternation):
    """Each solve starts from the one before."""

    solver: Solver

    def __init__(self, race: Race, rates: Rates, generator: Generator) -> None:
        super().__init__(race, rates, generator)
        self.last: Params | None = None

    def direction(self) -> Tensor:
        self.descend()
        hvp = ReverseOverReverse(keep_graph=True)
        result = hypergradient(**self.arguments(), solver=self.solver, hvp=hvp, x0=self.last)
        assert result.solution is not None
        self.last = result.solution.value
        return result.grad["x"]


class ImplicitCG(Implicit):
    solver = CG(SOLVER_ITERATIONS, SOLVER_RTOL)


class ImplicitNystrom(Implicit):
    solver = Nystrom(10, max_refinements=SOLVER_ITERATIONS, rtol=SOLVER_RTOL)


class Unrolled(Alternation):
    """Differentiates through the last ten of its lower steps, which begin without momentum."""

    def direction(self) -> Tensor:
        result = unrolled_hypergradient(
            **{**self.arguments(), "lower_batches": self.lower_batches(LOWER_STEPS)},
            update=SGDUpdate(self.rates.lower, MOMENTUM),
            truncation=LOWER_STEPS // 2,
        )
        assert result.lower is not None
        with torch.no_grad():
            self.y.copy_(result.lower["y"])
        return result.grad["x"]


class Penalty(Alternation):
    """The penalised copy makes 5 steps of its own an alternation and is carried along."""

    def __init__(self, race: Race, rates: Rates, generator: Generator) -> None:
        super().__init__(race, rates, generator)
        self.penalized: Params | None = None

    def direction(self) -> Tensor:
        self.descend()
        result = penalty_hypergradient(
            **{**self.arguments(), "lower_batches": self.lower_batches(PENALIZED_STEPS)},
            update=SGDUpdate(self.rates.lower, MOMENTUM),
            penalty=10.0,
            penalized=self.penalized,
        )
        self.penalized = result.lower
        return result.grad["x"]


class OneStep(Alternation):
    """No system: SAMA, with the sensitivity of the lower optimizer."""

    def direction(self) -> Tensor:
        self.descend()
        return self.compute().grad["x"]

    def compute(self) -> Hypergradient:
        update, state = from_optimizer(self.lower_optimizer, {"y": self.y})
        return sama_hypergradient(**self.arguments(), update=update, state=state, hvp=ReverseOverReverse())


class Darts(OneStep):
    def compute(self) -> Hypergradient:
        return darts_hypergradient(**self.arguments(), step_size=self.rates.lower, hvp=ReverseOverReverse())


class TorchOptImplicit(Alternation):
    """custom_root around y with solve_cg; starts every solve from 0, which is all it offers."""

    def direction(self) -> Tensor:
        self.descend()
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


class TorchOptUnrolled(Alternation):
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

    draw: Callable[[Generator], Batch]
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


ENTRIES: tuple[Entry, ...] = (
    Entry("implicit, CG, warm start", "", ImplicitCG),
    Entry("implicit, Nystrom", "", ImplicitNystrom),
    Entry("unrolled, last 10 steps", "", Unrolled),
    Entry("penalty (F2SA)", "", Penalty),
    Entry("SAMA", "", OneStep),
    Entry("one virtual step (DARTS)", "", Darts),
    Entry("TorchOpt, implicit CG", "torchopt", TorchOptImplicit),
    Entry("TorchOpt, unrolled", "torchopt", TorchOptUnrolled),
    Entry("Betty, CG", "betty-ml", Betty),
    Entry("Betty, Neumann", "betty-ml", BettyNeumann),
    Entry("Betty, DARTS", "betty-ml", BettyDarts),
)
