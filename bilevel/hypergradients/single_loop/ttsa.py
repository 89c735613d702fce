"""The hypergradient by one random term of the Neumann series, on two time scales."""

from dataclasses import dataclass, field
from typing import final

from bilevel.checks import check_count, check_number
from bilevel.hypergradients.method import MethodState, UpperStep
from bilevel.hypergradients.single_loop.estimators import neumann, random_length, sampled
from bilevel.hypergradients.single_loop.frame import Estimate, Point, SingleLoop
from bilevel.lower import Oracles


@final
@dataclass(frozen=True, eq=False)
class TTSA(SingleLoop):
    r"""Two-timescale stochastic approximation (TTSA; Hong, Wai, Wang & Yang 2023, Algorithm 1): one lower step, then
    one upper step along dF/dx - d2G/dxdy v with

    .. math:: v = \eta (Q + 1) \prod_{j \le k} \left(I - \eta \frac{\partial^2 G}{\partial y^2}(\xi_j)\right)
       \frac{\partial F}{\partial y}(\xi), \qquad k \text{ uniform in } 0 \ldots Q.

    Its mean is that of `StocBiO`, at half the products and with a larger variance. The paper's rates decay as t^(-3/5)
    above and t^(-2/5) below (`power_decay`), with one lower and one upper step an alternation; with several lower steps
    it is BSA (Ghadimi & Wang 2018).

    An upper step costs Q / 2 Hessian-vector products on average, a cross product and a gradient on lower samples, and a
    gradient on an upper one. No state: k is a function of the step and its samples.

    Args:
        step_size: eta > 0, below 2 over the largest eigenvalue of any sample's d2G/dydy.
        terms: Q >= 1.
    """

    step_size: float
    terms: int = field(default=10, kw_only=True)

    moves_lower = False

    def __post_init__(self) -> None:
        check_number("TTSA: step_size", self.step_size, positive=True)
        check_count("TTSA: terms", self.terms, least=1)

    @property
    def lower_draws(self) -> int:
        return self.terms + 1

    def estimate(self, oracles: Oracles, at: Point, state: MethodState, step: UpperStep) -> Estimate:
        above = oracles.upper(at.upper, at.lower, step.upper_draws[0])
        *samples, last = step.lower_draws
        v = neumann(oracles, at, above.lower, samples, self.step_size, randomly=random_length(step, self.terms))
        found = sampled(oracles, at, v, above, last)
        return Estimate(found.loss, Point(found.grad, {}, {}), {}, result=found)
