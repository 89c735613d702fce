"""Amortised implicit gradients: warm steps on the linear system after the lower steps."""

from dataclasses import dataclass, field
from typing import final

from bilevel import tree
from bilevel.checks import check_count
from bilevel.hypergradients.method import MethodState, UpperStep
from bilevel.hypergradients.single_loop.estimators import sampled
from bilevel.hypergradients.single_loop.frame import AdjointLoop, Estimate, Point
from bilevel.lower import Oracles


@final
@dataclass(frozen=True, eq=False)
class AmIGO(AdjointLoop):
    r"""Amortized implicit gradient optimization (AmIGO; Arbel & Mairal 2022, Algorithm 1): y makes the schedule's lower
    steps from where it was, then v makes `v_steps` steps from where it was,

    .. math:: v \leftarrow v - \beta \left(\frac{\partial^2 G}{\partial y^2}(\xi_m) v
       - \frac{\partial F}{\partial y}(\xi)\right),

    each on a lower sample of its own, then x one along dF/dx - d2G/dxdy v. The paper's schedule has one upper step an
    alternation: ``AlternatingSchedule(alternations=T, lower_steps=N, upper_steps=1)``.

    An upper step costs v_steps Hessian-vector products, a cross product and a gradient on lower samples, and a gradient
    on an upper one. The state is v.

    Args:
        v_steps: M >= 1.
    """

    v_steps: int = field(default=10, kw_only=True)

    moves_lower = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("AmIGO: v_steps", self.v_steps, least=1)

    @property
    def lower_draws(self) -> int:
        return self.v_steps + 1

    def estimate(self, oracles: Oracles, at: Point, state: MethodState, step: UpperStep) -> Estimate:
        above, v = oracles.upper(at.upper, at.lower, step.upper_draws[0]), at.v
        rate = self.v_rate(step)
        *samples, last = step.lower_draws
        for sample in samples:
            product = oracles.hessian(at.upper, at.lower, v, sample)
            v = tree.axpy(-rate, tree.sub(product, above.lower), v)
        found = sampled(oracles, at, v, above, last)
        return Estimate(found.loss, Point(found.grad, {}, {}), {"v": v}, tuple(v.values()), result=found)
