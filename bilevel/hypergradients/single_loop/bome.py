"""First-order directions of the value-function problem, with a dynamic multiplier."""

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from bilevel import tree
from bilevel.checks import check_count, check_number
from bilevel.hypergradients.method import MethodState, UpperStep
from bilevel.hypergradients.single_loop.frame import Estimate, Point, SingleLoop
from bilevel.lower import Oracles


@final
@dataclass(frozen=True, eq=False)
class BOME(SingleLoop):
    r"""Bilevel optimization made easy (BOME; Liu, Ye, Wright, Stone & Liu 2022, Algorithm 1): with
    :math:`q(x, y) = G(x, y) - G(x, \hat y)` and :math:`\hat y` from y by T steps of gradient descent on G, both levels
    go along

    .. math:: \nabla F + \lambda \nabla q, \qquad \lambda = \max\left(0,
       \frac{\phi - \langle \nabla F, \nabla q \rangle}{\|\nabla q\|^2}\right), \qquad \phi = \eta \|\nabla q\|^2,

    where :math:`\hat y` counts as a constant. The method is made for the whole set as the one sample: the multiplier is
    a ratio, which samples bias. Lower variables that do not respond to the upper ones (`Problem.implicit`) are the same
    in y and :math:`\hat y`, and descend on G.

    A step costs T + 1 gradients on a lower sample and one on an upper sample; no second derivative is taken. No state.

    Args:
        inner_rate: learning rate of the T steps, > 0.
        inner_steps: T >= 1.
        control: eta > 0, how fast q shall fall beside F.
    """

    inner_rate: float
    inner_steps: int = field(default=10, kw_only=True)
    control: float = field(default=0.5, kw_only=True)

    takes_products = False

    def __post_init__(self) -> None:
        check_number("BOME: inner_rate", self.inner_rate, positive=True)
        check_count("BOME: inner_steps", self.inner_steps, least=1)
        check_number("BOME: control", self.control, positive=True)

    def estimate(self, oracles: Oracles, at: Point, state: MethodState, step: UpperStep) -> Estimate:
        (lower,), (upper,) = step.lower_draws, step.upper_draws
        here = there = oracles.lower_gradients(at.upper, at.lower, lower)
        ahead = tree.detach({name: at.lower[name] for name in oracles.names})
        for _ in range(self.inner_steps):
            ahead = tree.axpy(-self.inner_rate, {name: there.lower[name] for name in ahead}, ahead)
            there = oracles.lower_gradients(at.upper, {**at.lower, **ahead}, lower)
        above = oracles.upper(at.upper, at.lower, upper)
        d_f = Point(above.upper, above.lower, {})
        d_q = Point(tree.sub(here.upper, there.upper), {name: here.lower[name] for name in ahead}, {})
        square = _dot(d_q, d_q)
        multiplier = torch.where(square > 0, (self.control - _dot(d_f, d_q) / square).clamp(min=0.0), 0.0)
        direction = d_f.plus(multiplier, d_q)
        return Estimate(above.value, direction._replace(lower={**here.lower, **direction.lower}), {})


def _dot(one: Point, other: Point) -> Tensor:
    return tree.dot(one.upper, other.upper) + tree.dot(one.lower, other.lower)
