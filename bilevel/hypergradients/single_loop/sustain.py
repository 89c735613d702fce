"""Recursive momentum for both levels, with one random term of the Neumann series."""

from dataclasses import dataclass
from typing import ClassVar, final

from bilevel.hypergradients.single_loop.estimators import RecursiveMomentum


@final
@dataclass(frozen=True, eq=False)
class SUSTAIN(RecursiveMomentum):
    r"""Single-timescale double-momentum stochastic approximation (SUSTAIN; Khanduri, Zeng, Hong, Wai, Wang & Yang 2021,
    Algorithm 1): recursive momentum for x and y, with the adjoint variable from one random term of a Neumann series,

    .. math:: v = \eta (Q + 1) \prod_{j \le k} \left(I - \eta \frac{\partial^2 G}{\partial y^2}(\xi_j)\right)
       \frac{\partial F}{\partial y}(\xi), \qquad k \text{ uniform in } 0 \ldots Q.

    A step costs, at two points each, a gradient, a cross product and Q / 2 Hessian-vector products on average on lower
    samples, and a gradient on an upper one. The state is the former point and directions.
    """

    one_term: ClassVar[bool] = True
