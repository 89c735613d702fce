"""The hypergradient by a truncated Neumann series whose every product is on another sample."""

from dataclasses import dataclass, field
from typing import final

from bilevel.checks import check_count, check_number
from bilevel.hypergradients.method import MethodState, UpperStep
from bilevel.hypergradients.single_loop.estimators import neumann, sampled
from bilevel.hypergradients.single_loop.frame import Estimate, Point, SingleLoop
from bilevel.lower import Oracles


@final
@dataclass(frozen=True, eq=False)
class StocBiO(SingleLoop):
    r"""Stochastic bilevel optimizer (stocBiO; Ji, Yang & Liang 2021, Algorithms 2 and 3): y makes the schedule's lower
    steps, then

    .. math:: v = \eta \sum_{q=0}^{Q} \prod_{j \le q} \left(I - \eta \frac{\partial^2 G}{\partial y^2}(\xi_j)\right)
       \frac{\partial F}{\partial y}(\xi)

    and x one step along dF/dx - d2G/dxdy v. On independent samples the mean of v is this series of the whole set's
    Hessian, which differs from its inverse by ``(1 - eta mu)^(Q+1) / mu`` at most, mu being its smallest eigenvalue.

    An upper step costs Q Hessian-vector products, a cross product and a gradient on lower samples, and a gradient on an
    upper one. No state.

    Args:
        step_size: eta > 0, below 2 over the largest eigenvalue of any sample's d2G/dydy.
        terms: Q >= 1.
    """

    step_size: float
    terms: int = field(default=10, kw_only=True)

    moves_lower = False

    def __post_init__(self) -> None:
        check_number("StocBiO: step_size", self.step_size, positive=True)
        check_count("StocBiO: terms", self.terms, least=1)

    @property
    def lower_draws(self) -> int:
        return self.terms + 1

    def estimate(self, oracles: Oracles, at: Point, state: MethodState, step: UpperStep) -> Estimate:
        above = oracles.upper(at.upper, at.lower, step.upper_draws[0])
        v = neumann(oracles, at, above.lower, step.lower_draws[:-1], self.step_size)
        found = sampled(oracles, at, v, above, step.lower_draws[-1])
        return Estimate(found.loss, Point(found.grad, {}, {}), {}, result=found)
