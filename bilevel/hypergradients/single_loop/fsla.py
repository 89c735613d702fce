"""Stochastic directions with a recursive momentum for x."""

from dataclasses import dataclass, field
from typing import final

from bilevel.checks import check_number
from bilevel.hypergradients.method import MethodState, UpperStep
from bilevel.hypergradients.single_loop.estimators import storm
from bilevel.hypergradients.single_loop.frame import AdjointLoop, Estimate, Point, directions
from bilevel.lower import Oracles


@final
@dataclass(frozen=True, eq=False)
class FSLA(AdjointLoop):
    r"""Fully single loop algorithm (FSLA; Li, Gu & Huang 2022, Algorithm 1): y and v go along stochastic directions,
    and x along

    .. math:: d_t = D_x(z_t; \xi_t) + (1 - \eta_t) \left(d_{t-1} - D_x(z_{t-1}; \xi_t)\right)

    at z = (x, y, v). Here all three move from the same point; the paper moves y and v before x.

    A step costs a gradient, a Hessian-vector product and a cross product on a lower sample and a gradient on an upper
    one, at two points. The state is v, the former point and the direction of x.

    Args:
        momentum: eta in (0, 1]; 1 is `SOBA`.
        decay: eta_t = momentum / (t + 1)^decay for step t from 0.
    """

    momentum: float = field(default=0.5, kw_only=True)
    decay: float = field(default=0.5, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("FSLA: momentum", self.momentum, positive=True, most=1.0)
        check_number("FSLA: decay", self.decay)

    def estimate(self, oracles: Oracles, at: Point, state: MethodState, step: UpperStep) -> Estimate:
        samples, count = (step.lower_draws[0], step.upper_draws[0]), state.get("count", 0)
        loss, direction = directions(oracles, at, *samples)
        if "point" in state:
            before = Point.of_state({**state["point"], "upper": state["direction"]}, at).upper
            _, old = directions(oracles, Point.of_state(state["point"], at), *samples)
            eta = self.momentum / (count + 1) ** self.decay
            direction = direction._replace(upper=storm(direction.upper, old.upper, before, eta))
        following = {"count": count + 1, "point": at.as_state(), "direction": direction.as_state()["upper"]}
        return Estimate(loss, direction, following)
