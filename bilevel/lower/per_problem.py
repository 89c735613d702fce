"""What is known of a problem once it was examined, or said."""

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar, final

from bilevel.problem import Problem

T = TypeVar("T")


@final
class PerProblem(Generic[T]):
    """A value for each Problem, kept for as long as the Problem lives."""

    def __init__(self, make: Callable[[], T]) -> None:
        # By identity: a Problem need not be hashable.
        self._make, self._values = make, dict[int, T]()

    def of(self, problem: Problem) -> T:
        """The problem's own value, made when it is first asked for."""
        identity = id(problem)
        if identity not in self._values:
            self._values[identity] = self._make()
            weakref.finalize(problem, self._values.pop, identity, None)
        return self._values[identity]
