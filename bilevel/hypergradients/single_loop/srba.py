"""Directions with SARAH's variance reduction: differences of neighbouring points, now and then the whole sum."""

from dataclasses import dataclass, field
from typing import final

from bilevel.checks import check_count
from bilevel.hypergradients.method import MethodState, Setup, UpperStep
from bilevel.hypergradients.single_loop.frame import AdjointLoop, Estimate, Point, directions
from bilevel.hypergradients.single_loop.partitions import check_partitions, whole_directions
from bilevel.lower import Oracles


@final
@dataclass(frozen=True, eq=False)
class SRBA(AdjointLoop):
    r"""Stochastic recursive bilevel algorithm (SRBA; Dagréou, Moreau, Vaiter & Ablin 2024, Algorithm 1):

    .. math:: \Delta_t = D(z_t; \xi_t) - D(z_{t-1}; \xi_t) + \Delta_{t-1}, \qquad
       \Delta_t = D(z_t) \text{ on all samples where } q \text{ divides } t,

    for the three directions D together at z = (x, y, v). The paper also keeps v in a ball, which is left out here.

    A step costs twice what one of `SOBA` does, and every q-th one a pass over both sets. The state is v, the former
    point and direction, and the count of steps. Needs data with a fixed partition at both levels
    (`bilevel.training.Blocks`, or a list of batches).

    Args:
        period: q >= 1; default half of the number of blocks of both levels together.
    """

    period: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.period is not None:
            check_count("SRBA: period", self.period, least=1)

    def check(self, setup: Setup) -> None:
        super().check(setup)
        check_partitions("SRBA", setup)

    def estimate(self, oracles: Oracles, at: Point, state: MethodState, step: UpperStep) -> Estimate:
        period = self.period or max(1, sum(check_partitions("SRBA", step)) // 2)
        count = state.get("count", 0)
        if count % period == 0:
            loss, direction = whole_directions(oracles, at, step)
        else:
            samples = step.lower_draws[0], step.upper_draws[0]
            loss, new = directions(oracles, at, *samples)
            _, old = directions(oracles, Point.of_state(state["point"], at), *samples)
            direction = Point.of_state(state["direction"], at).plus(1.0, new).plus(-1.0, old)
        following = {"count": count + 1, "point": at.as_state(), "direction": direction.as_state()}
        return Estimate(loss, direction, following)
