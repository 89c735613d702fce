"""Passes whose random masks repeat, seeded only where a problem draws any."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from bilevel.lower.per_problem import PerProblem
from bilevel.nn import GeneratorMark
from bilevel.problem import Problem

T = TypeVar("T")


@dataclass
class _Draws:
    """Whether the objectives draw random numbers; None before anybody has looked."""

    known: bool | None = None


_draws = PerProblem(_Draws)


def repeatable(problem: Problem, compute: Callable[[bool], T], probe: Callable[[], object]) -> T:
    """``compute(seeded)`` with seeded=False where the problem's objectives draw no random numbers, which spares the
    seeding of every pass; one that draws after all is undone in the generators and computed again, seeded.

    Args:
        compute: makes passes of the objectives, each of which seeds the generators if told so.
        probe: makes one unseeded pass of each objective and writes nothing; called once for a problem.
    """
    draws = _draws.of(problem)
    mark = GeneratorMark()
    if draws.known is None:
        probe()
        draws.known = mark.moved()
        if draws.known:
            mark.restore()
    if not draws.known:
        result = compute(False)
        if not mark.moved():
            return result
        mark.restore()
        draws.known = True
    return compute(True)
