"""Passes whose random masks repeat, seeded only where a problem draws any."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Literal, TypeVar

from bilevel.lower.per_problem import PerProblem
from bilevel.nn import GeneratorMark, TorchMark, seeded
from bilevel.problem import Problem

T = TypeVar("T")

_draws = PerProblem(dict[str, bool])
"""Whether an objective draws random numbers, by level; a level is missing before a pass has shown it."""

_watched: ContextVar[bool] = ContextVar("bilevel_generators_watched", default=False)
"""Whether the generators are looked at after several passes (`all_repeatable`)."""

_made_again: ContextVar[bool] = ContextVar("bilevel_passes_made_again", default=False)
"""Whether several passes are made a second time."""


def repeatable(problem: Problem, level: Literal["upper", "lower"], seed: int, compute: Callable[[bool], T]) -> T:
    """A pass of a level's objective whose random masks are those of `seed`, with the default generators as they were
    after it.

    One whose first pass drew no random numbers is not seeded from then on, which is most of what a small pass would
    cost; where torch's generator moves after all, the pass is made again, seeded. NumPy's and Python's generators are
    looked at in the first pass alone.

    Args:
        compute: makes the pass; True is passed where it is made again.
    """
    found, again = _draws.of(problem), False
    if found.get(level) is False:
        if _watched.get():
            return compute(False)
        mark = TorchMark()
        result = compute(False)
        if not mark.moved():
            return result
        mark.restore()
        found[level] = again = True
    with seeded(seed):
        if level in found:
            return compute(again or _made_again.get())
        everything = GeneratorMark()
        result = compute(False)
        found[level] = everything.moved()
        return result


def all_repeatable(problem: Problem, compute: Callable[[], T]) -> T:
    """What `compute` makes of several `repeatable` passes, with one look at torch's generator after all of them; where
    it has moved all is computed again, seeded. Nothing but the objectives draws from it."""
    found = _draws.of(problem)
    if draws(problem) is not False:
        return compute()
    mark, token = TorchMark(), _watched.set(True)
    try:
        result = compute()
    finally:
        _watched.reset(token)
    if not mark.moved():
        return result
    mark.restore()
    found["lower"] = found["upper"] = True
    second = _made_again.set(True)
    try:
        return compute()
    finally:
        _made_again.reset(second)


def draws(problem: Problem) -> bool | None:
    """Whether one of the problem's objectives draws random numbers; None before passes of both have shown it."""
    found = _draws.of(problem)
    return True if any(found.values()) else False if len(found) == 2 else None
