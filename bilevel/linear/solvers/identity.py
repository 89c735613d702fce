"""The solve that makes no product."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, final

from bilevel.linear.operators import LinearOperator
from bilevel.linear.solution import Solution, Status
from bilevel.linear.solver import Solver
from bilevel.tree import Params


@final
@dataclass(frozen=True)
class Identity(Solver):
    """x = b: takes A for the identity (first-order hypergradient; in a proximal problem, H/c for 0).

    No product is made, so the residual is not measured: `residual_norms` ends in NaN.
    """

    needs_symmetric: ClassVar[bool] = False

    @property
    def uses_start(self) -> bool:
        return False

    def _solve(self, operator: LinearOperator, b: Params, x0: Params | None, state: Any) -> Solution:
        return Solution(b, Status.BUDGET, (1.0, math.nan), 0, 0)
