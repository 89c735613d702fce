"""Contestants of the finite sums: how a run is driven and its oracle calls are counted, and this package's methods."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.race.finite_sums.problems import BATCH, FiniteSum, Steps
from benchmarks.race.problems import Batch
from bilevel import (
    CG,
    AlternatingSchedule,
    Implicit,
    Level,
    Method,
    Params,
    Problem,
    Trainer,
)
from bilevel.hypergradients import (
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
    StocBiO,
)
from bilevel.products import ReverseOverReverse
from bilevel.training import Blocks, derive_seed, power_decay

Look = Callable[[Tensor], bool]
"""Takes x before the first iteration and after every chunk of them; False ends the run. The clock stands meanwhile."""

COUNTED_SHARE = 0.25
"""Oracle calls are counted for this share of the budget; what comes later is taken to go on so."""


class Contestant(ABC):
    """A method made ready for a problem: warm, compiled, and with its oracle calls counted."""

    def __init__(self, problem: FiniteSum) -> None:
        self.problem, self.calls = problem, 0
        self.counts: list[int] = []

    @property
    def chunk(self) -> int:
        """Iterations between two looks."""
        return self.problem.chunk

    @abstractmethod
    def run(self, steps: Steps, seed: int, look: Look) -> None:
        """One run from the problem's start."""

    def oracles(self, chunks: float) -> float:
        """Oracle calls of the first so many chunks."""
        counted = len(self.counts) - 1
        if chunks <= counted:
            return self.counts[int(chunks)]
        return self.counts[-1] * chunks / counted

    def count(self, samples: int) -> None:
        """Hears of every oracle call in a run that counts."""
        self.calls += samples

    def counting(self, x: Tensor) -> bool:
        """The `Look` of such a run."""
        if not self.counts:
            # Of a compilation.
            self.calls = 0
        self.counts.append(self.calls)
        return self.calls < COUNTED_SHARE * self.problem.budget


@dataclass(frozen=True)
class Entry:
    """`package` is the name of what it belongs to, in the tables, "" for this one; `only` the problem that it is for,
    "" for all."""

    name: str
    package: str
    prepare: Callable[[FiniteSum], Contestant]
    only: str = ""

    @property
    def title(self) -> str:
        return f"{self.name} ({self.package})" if self.package else self.name


class SumProblem(Problem):
    """A finite sum. With `count` its objectives tell of oracle calls: a gradient of F counts one a sample; at G every
    derivative in one level's variables does, a gradient, a product with d2G/dydy and one with d2G/dxdy.

    What is asked of automatic differentiation counts, used or not: a product by itself includes its gradient.
    """

    def __init__(self, problem: FiniteSum, count: Callable[[int], None] | None = None) -> None:
        self.problem, self.count = problem, count

    def lower_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        x, y = (self._counted(leaf, len(batch[0])) for leaf in (upper["x"], lower["y"]))
        return self.problem.lower_loss(x, y, batch)

    def upper_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        return self._counted(self.problem.upper_loss(upper["x"], lower["y"], batch), len(batch[0]))

    def _counted(self, tensor: Tensor, samples: int) -> Tensor:
        """The tensor, which counts whenever a derivative comes through it."""
        if self.count is None or not tensor.requires_grad:
            return tensor
        told, watched = self.count, tensor.view_as(tensor)
        watched.register_hook(lambda _: told(samples))
        return watched


@dataclass(frozen=True)
class Own:
    """How a method of this package is trained; its rates in step t are those of the grid by (t + 1)^decay.

    Attributes:
        method: of the steps and the number of lower batches in the whole.
        lower_steps: of an alternation; 0: a single loop.
        decays: exponents of the lower and of the upper rate.
    """

    method: Callable[[Steps], Method]
    lower_steps: int = 0
    decays: tuple[float, float] = (0.0, 0.0)


class OwnContestant(Contestant):
    """A `Trainer` with plain SGD at both levels, of data in blocks."""

    def __init__(self, problem: FiniteSum, how: Own) -> None:
        super().__init__(problem)
        self.how = how
        self._run(SumProblem(problem, self.count), problem.grid[0], 0, self.counting)

    def run(self, steps: Steps, seed: int, look: Look) -> None:
        self._run(SumProblem(self.problem), steps, seed, look)

    def _run(self, problem: SumProblem, steps: Steps, seed: int, look: Look) -> None:
        how = self.how
        x, y = (start.clone().requires_grad_() for start in (self.problem.upper, self.problem.lower))
        lower = self._level("y", y, self.problem.lower_data, steps.size, how.decays[0], seed)
        upper = self._level("x", x, self.problem.upper_data, steps.upper, how.decays[1], seed)
        in_turn = 1 if how.lower_steps else self.chunk
        # How many alternations are made is for `look` to say.
        schedule = AlternatingSchedule(1, how.lower_steps, upper_steps=in_turn)
        trainer = Trainer(problem, upper, lower, schedule, how.method(steps), on_failure="ignore")
        while look(x.detach()):
            for _ in range(self.chunk // in_turn):
                trainer.advance()

    def _level(self, name: str, start: Tensor, data: Batch, rate: float, decay: float, seed: int) -> Level:
        optimizer = torch.optim.SGD([start], lr=rate)

        def load(points: Tensor) -> Batch:
            first, last = int(points[0]), int(points[-1])
            return tuple(t[first : last + 1] for t in data)

        blocks = Blocks(len(data[0]), BATCH, load, seed=derive_seed(seed, name) % 2**32)
        return Level({name: start}, optimizer, blocks, scheduler=power_decay(optimizer, decay) if decay else None)


def implicit_cg(steps: Steps) -> Method:
    """The system of four batches, solved to 1e-2, from the last solution where that pays."""
    hvp = ReverseOverReverse(keep_graph=True)
    return Implicit(CG(10, 1e-2), hvp=hvp, hessian_batches=4, warm_start=True)


METHODS: dict[str, Own] = {
    "SOBA": Own(lambda steps: SOBA(), decays=(0.5, 0.5)),
    "MA-SOBA": Own(lambda steps: MASOBA(), decays=(0.5, 0.5)),
    "SABA": Own(lambda steps: SABA()),
    "SRBA": Own(lambda steps: SRBA()),
    "SUSTAIN": Own(lambda steps: SUSTAIN(steps.size), decays=(1 / 3, 1 / 3)),
    "MRBO": Own(lambda steps: MRBO(steps.size), decays=(1 / 3, 1 / 3)),
    "FSLA": Own(lambda steps: FSLA(), decays=(0.5, 0.5)),
    "AmIGO": Own(lambda steps: AmIGO(), lower_steps=10),
    "stocBiO": Own(lambda steps: StocBiO(steps.size), lower_steps=10),
    "TTSA": Own(lambda steps: TTSA(steps.size), lower_steps=1, decays=(0.4, 0.6)),
    "F2SA": Own(lambda steps: F2SA(growth=0.1), decays=(4 / 7, 4 / 7)),
    "implicit, CG": Own(implicit_cg, lower_steps=10),
}
"""With the decays and lower steps of benchmark_bilevel's solvers."""


def own(name: str) -> Entry:
    return Entry(name, "", lambda problem: OwnContestant(problem, METHODS[name]))
