"""First-order directions of a penalised problem whose penalty grows."""

from dataclasses import dataclass, field
from typing import final

from bilevel import tree
from bilevel.checks import check_number
from bilevel.hypergradients.method import MethodState, UpperStep
from bilevel.hypergradients.single_loop.frame import AdjointLoop, Estimate, Point
from bilevel.lower import Oracles
from bilevel.tree import Params


@final
@dataclass(frozen=True, eq=False)
class F2SA(AdjointLoop):
    r"""Fully first-order stochastic approximation (F2SA; Kwon, Kwon, Wright & Nowak 2023, Algorithm 1 with T = 1):

    .. math:: D_y = \frac{\partial G}{\partial y}(x, y), \qquad
       D_z = \frac{\partial G}{\partial y}(x, z) + \frac{1}{\sigma} \frac{\partial F}{\partial y}(x, z), \qquad
       D_x = \frac{\partial F}{\partial x}(x, z) + \sigma \left(\frac{\partial G}{\partial x}(x, z)
       - \frac{\partial G}{\partial x}(x, y)\right).

    z, which begins at y, minimises the penalised problem and stands in the place of v; sigma grows by `growth` a step.
    All move from the same point; the paper moves y and z before x. `Penalty` is the same with several steps of z by an
    optimizer of its own and a fixed sigma. The bias is of order 1 / sigma, the noise of D_x of order sigma.

    A step costs gradients on a lower sample at two points and a gradient on an upper one; no second derivative is
    taken. The state is z and the count of steps.

    Args:
        penalty: sigma > 0 at the first step.
        growth: what sigma grows by a step, >= 0.
    """

    penalty: float = field(default=1.0, kw_only=True)
    growth: float = field(default=0.0, kw_only=True)

    takes_products = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("F2SA: penalty", self.penalty, positive=True)
        check_number("F2SA: growth", self.growth)

    def start(self, step: UpperStep, names: tuple[str, ...]) -> Params:
        return {name: step.lower[name].detach().clone() for name in names}

    def estimate(self, oracles: Oracles, at: Point, state: MethodState, step: UpperStep) -> Estimate:
        count = state.get("count", 0)
        sigma, (lower,), (upper,) = self.penalty + count * self.growth, step.lower_draws, step.upper_draws
        penalised = {**at.lower, **at.v}
        at_y = oracles.lower_gradients(at.upper, at.lower, lower)
        at_z = oracles.lower_gradients(at.upper, penalised, lower)
        above = oracles.upper(at.upper, penalised, upper)
        d_x = tree.axpy(sigma, tree.sub(at_z.upper, at_y.upper), above.upper)
        d_z = tree.axpy(1.0 / sigma, above.lower, {name: at_z.lower[name] for name in at.v})
        return Estimate(above.value, Point(d_x, at_y.lower, d_z), {"count": count + 1})
