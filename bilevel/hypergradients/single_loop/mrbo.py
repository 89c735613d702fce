"""Recursive momentum for both levels, with a truncated Neumann series."""

from dataclasses import dataclass
from typing import final

from bilevel.hypergradients.single_loop.estimators import RecursiveMomentum


@final
@dataclass(frozen=True, eq=False)
class MRBO(RecursiveMomentum):
    r"""Momentum-based recursive bilevel optimizer (MRBO; Yang, Ji & Liang 2021, Algorithm 1): recursive momentum for x
    and y, with the adjoint variable from a Neumann series whose products are on samples of their own,

    .. math:: v = \eta \sum_{q=0}^{Q} \prod_{j \le q} \left(I - \eta \frac{\partial^2 G}{\partial y^2}(\xi_j)\right)
       \frac{\partial F}{\partial y}(\xi).

    A step costs, at two points each, a gradient, a cross product and Q Hessian-vector products on lower samples, and a
    gradient on an upper one. The state is the former point and directions.
    """
