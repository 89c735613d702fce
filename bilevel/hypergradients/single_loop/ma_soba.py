"""Stochastic directions with a moving average for x."""

from dataclasses import dataclass, field
from typing import final

from bilevel import tree
from bilevel.checks import check_number
from bilevel.hypergradients.method import MethodState, UpperStep
from bilevel.hypergradients.single_loop.frame import AdjointLoop, Estimate, Point, directions
from bilevel.lower import Oracles


@final
@dataclass(frozen=True, eq=False)
class MASOBA(AdjointLoop):
    r"""SOBA with a moving average of the direction of x (MA-SOBA; Chen, Xiao & Balasubramanian 2024, Algorithm 1):

    .. math:: x \leftarrow x - \alpha h, \qquad h \leftarrow (1 - \theta) h + \theta D_x,

    where D_x is on the step's samples at the point before it and h begins at 0. The average lets all three rates be of
    the same order.

    A step costs what one of `SOBA` does. The state is v and h.

    Args:
        averaging: theta in (0, 1]; 1 is SOBA one step late.
    """

    averaging: float = field(default=0.1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("MASOBA: averaging", self.averaging, positive=True, most=1.0)

    def estimate(self, oracles: Oracles, at: Point, state: MethodState, step: UpperStep) -> Estimate:
        loss, direction = directions(oracles, at, step.lower_draws[0], step.upper_draws[0])
        average = tree.zeros_like(direction.upper)
        if "average" in state:
            average = {name: leaf.to(average[name].device) for name, leaf in state["average"].items()}
        following = tree.axpy(self.averaging, direction.upper, tree.scale(1.0 - self.averaging, average))
        moved = direction._replace(upper=average)
        return Estimate(loss, moved, {"average": following}, tuple(following.values()))
