"""The hypergradient by a truncated Neumann series whose every product is on another sample."""

from dataclasses import dataclass
from typing import final

from bilevel.hypergradients.single_loop.estimators import SeriesHypergradient


@final
@dataclass(frozen=True, eq=False)
class StocBiO(SeriesHypergradient):
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
