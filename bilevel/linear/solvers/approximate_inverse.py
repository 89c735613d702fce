"""The solve by an inverse that is given."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, final

from bilevel.linear.operators import LinearOperator
from bilevel.linear.solution import Solution, Status
from bilevel.linear.solver import Solver
from bilevel.tree import Params


@final
@dataclass(frozen=True)
class ApproximateInverse(Solver):
    """x = M b with a given linear M that stands for the inverse of A: a learning rate, a diagonal, a factorisation.

    No product with A is made, so the residual is not measured: `residual_norms` ends in NaN.

    Args:
        inverse: b -> M b, linear, over the same names.

    Raises:
        TypeError: an `inverse` that cannot be called.
    """

    inverse: Callable[[Params], Params]
    needs_symmetric: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not callable(self.inverse):
            raise TypeError(
                f"ApproximateInverse: inverse must be a function of Params, got {type(self.inverse).__name__}; for a "
                "number a, pass lambda b: {name: a * leaf for name, leaf in b.items()}"
            )

    @property
    def uses_start(self) -> bool:
        return False

    def _solve(self, operator: LinearOperator, b: Params, x0: Params | None, state: Any) -> Solution:
        return Solution(self.inverse(b), Status.BUDGET, (1.0, math.nan), 0, 0)
