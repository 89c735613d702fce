"""What is examined, or said, once for a problem."""

import weakref
from collections.abc import Hashable
from typing import Any, final

from bilevel.problem import Problem


@final
class OncePerProblem:
    """Remembers, for as long as a Problem lives, what has been done for it: what an examination found, a warning."""

    def __init__(self) -> None:
        # By identity: a Problem need not be hashable.
        self._known: dict[int, dict[Hashable, Any]] = {}

    def first(self, problem: Problem, key: Hashable) -> bool:
        """Whether this is the first time for this problem and key."""
        if self.recall(problem, key):
            return False
        self.keep(problem, key, True)
        return True

    def recall(self, problem: Problem, key: Hashable) -> Any:
        """What was kept for this problem and key, None where nothing was."""
        return self._known.get(id(problem), {}).get(key)

    def keep(self, problem: Problem, key: Hashable, value: Any) -> None:
        """What `recall` shall give."""
        identity = id(problem)
        if identity not in self._known:
            self._known[identity] = {}
            weakref.finalize(problem, self._known.pop, identity, None)
        self._known[identity][key] = value
