"""Passes whose random masks repeat, seeded only where a problem draws any."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from bilevel.lower.per_problem import PerProblem
from bilevel.nn import GeneratorMark, TorchMark, seeded
from bilevel.problem import Problem

T = TypeVar("T")


@dataclass
class _Draws:
    """Whether the objectives draw random numbers; None before a pass has shown it."""

    known: bool | None = None


_draws = PerProblem(_Draws)


def repeatable(problem: Problem, seed: int, compute: Callable[[bool], T]) -> T:
    """A pass of an objective whose random masks are those of `seed`, with the default generators as they were after it.

    A problem whose first pass drew no random numbers is not seeded from then on, which is most of what a small pass
    would cost; where torch's generator moves after all, the pass is made again, seeded. NumPy's and Python's generators
    are looked at in the first pass alone.

    Args:
        compute: makes the pass; True is passed where it is made again.
    """
    found, again = _draws.of(problem), False
    if found.known is False:
        mark = TorchMark()
        result = compute(False)
        if not mark.moved():
            return result
        mark.restore()
        found.known = again = True
    with seeded(seed):
        if found.known:
            return compute(again)
        everything = GeneratorMark()
        result = compute(False)
        found.known = everything.moved()
        return result


def draws(problem: Problem) -> bool | None:
    """Whether the problem's objectives draw random numbers; None before a pass has shown it."""
    return _draws.of(problem).known
