"""The hypergradient by one random term of the Neumann series, on two time scales."""

from dataclasses import dataclass
from typing import ClassVar, final

from bilevel.hypergradients.single_loop.estimators import SeriesHypergradient


@final
@dataclass(frozen=True, eq=False)
class TTSA(SeriesHypergradient):
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

    one_term: ClassVar[bool] = True
