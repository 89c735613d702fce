"""Every bundled method, for tests that hold of all."""

from dataclasses import dataclass

from bilevel import CG, SAMA, Implicit, Method, OneStep, Penalty, SGDUpdate, Unrolled
from bilevel.linear import Neumann


@dataclass(frozen=True)
class Kind:
    """A method, how many upper steps an alternation it can make, and whether the schedule may adapt."""

    method: Method
    upper_steps: int = 3
    adapts: bool = True


METHODS = {
    "implicit": Kind(Implicit(CG(3, rtol=None), damping=2.0, hessian_batches=2)),
    "recycled": Kind(Implicit(CG(3, rtol=None, recycle=5), damping=2.0, hessian_batches=2)),
    "warm": Kind(Implicit(CG(2, rtol=None), damping=2.0, hessian_batches=2, warm_start=True)),
    "neumann": Kind(Implicit(Neumann(2), damping=2.0)),
    "aggregated": Kind(Implicit(CG(2, rtol=None), damping=2.0, aggregate=True, warm_start=True)),
    "unrolled": Kind(Unrolled(), upper_steps=1, adapts=False),
    "truncated": Kind(Unrolled(steps=2, recompute=True), upper_steps=1, adapts=False),
    "one step": Kind(OneStep(lower_batches=2)),
    "sama": Kind(SAMA()),
    "penalty": Kind(Penalty(SGDUpdate(0.1), 5.0, lower_batches=2)),
}
