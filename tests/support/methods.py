"""Every bundled method, for tests that hold of all."""

from dataclasses import dataclass

from bilevel import CG, Implicit, Method, OneStep, Penalty, SGDUpdate, Unrolled
from bilevel.hypergradients import (
    BOME,
    F2SA,
    FSLA,
    MASOBA,
    MRBO,
    SABA,
    SAMA,
    SOBA,
    SRBA,
    SUSTAIN,
    TTSA,
    AmIGO,
    StocBiO,
)
from bilevel.linear import Neumann


@dataclass(frozen=True)
class Kind:
    """A method, how many upper steps an alternation it can make, whether the schedule may adapt, and whether its data
    must be cut into blocks."""

    method: Method
    upper_steps: int = 3
    adapts: bool = True
    blocks: bool = False

    @property
    def lower_steps(self) -> int:
        """An alternation's."""
        return 0 if self.method.moves_lower else 3


METHODS = {
    "implicit": Kind(Implicit(CG(3, rtol=None), damping=2.0, hessian_batches=2)),
    "recycled": Kind(Implicit(CG(3, rtol=None, recycle=5), damping=2.0, hessian_batches=2)),
    "warm": Kind(Implicit(CG(2, rtol=None), damping=2.0, hessian_batches=2, warm_start=True)),
    "inexact, remembering": Kind(
        Implicit(CG(4, rtol="noise", memory=3, inexact=True), damping=2.0, hessian_batches=2, aggregate=True)
    ),
    "remembering": Kind(Implicit(CG(2, rtol=None, memory=3), damping=2.0, hessian_batches=2)),
    "neumann": Kind(Implicit(Neumann(2), damping=2.0)),
    "aggregated": Kind(Implicit(CG(2, rtol=None), damping=2.0, aggregate=True, warm_start=True)),
    "unrolled": Kind(Unrolled(), upper_steps=1, adapts=False),
    "truncated": Kind(Unrolled(steps=2, recompute=True), upper_steps=1, adapts=False),
    "one step": Kind(OneStep(lower_batches=2)),
    "sama": Kind(SAMA()),
    "penalty": Kind(Penalty(SGDUpdate(0.1), 5.0, lower_batches=2)),
    "SOBA": Kind(SOBA()),
    "MASOBA": Kind(MASOBA(averaging=0.5)),
    "SABA": Kind(SABA(), blocks=True),
    "SRBA": Kind(SRBA(period=3), blocks=True),
    "FSLA": Kind(FSLA()),
    "MRBO": Kind(MRBO(0.1, terms=2)),
    "SUSTAIN": Kind(SUSTAIN(0.1, terms=2)),
    "AmIGO": Kind(AmIGO(v_steps=2), upper_steps=1),
    "StocBiO": Kind(StocBiO(0.1, terms=2)),
    "TTSA": Kind(TTSA(0.1, terms=2)),
    "F2SA": Kind(F2SA(growth=0.1)),
    "BOME": Kind(BOME(0.1, inner_steps=2)),
}
