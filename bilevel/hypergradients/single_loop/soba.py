"""Stochastic directions, one sample of each level a step."""

from dataclasses import dataclass
from typing import final

from bilevel.hypergradients.method import MethodState, UpperStep
from bilevel.hypergradients.single_loop.frame import AdjointLoop, Estimate, Point, directions
from bilevel.lower import Oracles


@final
@dataclass(frozen=True, eq=False)
class SOBA(AdjointLoop):
    r"""Stochastic bilevel algorithm (SOBA; Dagréou, Ablin, Vaiter & Moreau 2022, Algorithm 1 with its section 3.1).

    The three directions on one sample of each level. They are unbiased at fixed (x, y, v); with constant rates the
    iterates end in a ball around the solution, and the paper's rates decay as ``1 / sqrt(t)`` (`power_decay`).

    A step costs a gradient, a Hessian-vector product and a cross product on a lower sample, and a gradient on an upper
    one. The state is v.
    """

    def estimate(self, oracles: Oracles, at: Point, state: MethodState, step: UpperStep) -> Estimate:
        loss, direction = directions(oracles, at, step.lower_draws[0], step.upper_draws[0])
        return Estimate(loss, direction, {})
