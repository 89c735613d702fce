"""What is examined, or said, once for a problem."""

import weakref
from collections.abc import Hashable
from typing import final

from bilevel.problem import Problem


@final
class OncePerProblem:
    """Remembers, for as long as a Problem lives, what has been done for it: an examination of the structure of its
    variables, a warning."""

    def __init__(self) -> None:
        # By identity: a Problem need not be hashable.
        self._done: dict[int, set[Hashable]] = {}

    def first(self, problem: Problem, key: Hashable) -> bool:
        """Whether this is the first time for this problem and key."""
        identity = id(problem)
        if identity not in self._done:
            self._done[identity] = set()
            weakref.finalize(problem, self._done.pop, identity, None)
        if key in self._done[identity]:
            return False
        self._done[identity].add(key)
        return True
