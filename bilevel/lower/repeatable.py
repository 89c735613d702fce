"""Passes whose random masks repeat, seeded only where a problem draws any."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from bilevel.lower.per_problem import PerProblem
from bilevel.nn import GeneratorMark, TorchMark
from bilevel.problem import Problem

T = TypeVar("T")


@dataclass
class _Draws:
    """Whether the objectives draw random numbers; None before anybody has looked."""

    known: bool | None = None


_draws = PerProblem(_Draws)


def repeatable(problem: Problem, compute: Callable[[bool], T], probe: Callable[[], object]) -> T:
    """``compute(seeded)`` with seeded=False where the problem's objectives draw no random numbers, which spares the
    seeding of every pass; one that draws from torch's generator after all is computed again, seeded. NumPy's and
    Python's generators are looked at once for a problem.

    Args:
        compute: makes passes of the objectives, each of which seeds the generators if told so.
        probe: makes one unseeded pass of each objective and writes nothing; called once for a problem.
    """
    draws = _draws.of(problem)
    if draws.known is None:
        everything = GeneratorMark()
        probe()
        draws.known = everything.moved()
        if draws.known:
            everything.restore()
    if not draws.known:
        mark = TorchMark()
        result = compute(False)
        if not mark.moved():
            return result
        mark.restore()
        draws.known = True
    return compute(True)
