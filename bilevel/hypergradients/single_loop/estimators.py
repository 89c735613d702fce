"""What several stochastic methods share: recursive momentum and sampled Neumann series."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from bilevel import distributed, tree
from bilevel.checks import check_count, check_number
from bilevel.hypergradients.method import MethodState, UpperStep
from bilevel.hypergradients.result import Hypergradient
from bilevel.hypergradients.single_loop.frame import Estimate, Point, SingleLoop
from bilevel.lower import Draw, FirstDerivatives, Oracles
from bilevel.tree import Params


def storm(new: Params, old: Params, before: Params, momentum: float) -> Params:
    """The recursive momentum ``new + (1 - momentum)(before - old)`` (STORM; Cutkosky & Orabona 2019, equation 2), with
    `new` and `old` from one sample at the present and at the former point."""
    return tree.axpy(1.0 - momentum, tree.sub(before, old), new)


def neumann(
    oracles: Oracles, at: Point, b: Params, draws: Sequence[Draw], step_size: float, *, randomly: int | None = None
) -> Params:
    """About A^-1 b for A = d2G/dydy, by products on one sample each.

    The truncated series eta sum_{q=0}^{Q} prod_{j<=q} (I - eta A_j) b, by Q products (Horner's scheme); or with
    `randomly` = k one term of it for all, eta (Q + 1) prod_{j<=k} (I - eta A_j) b by k products, which has the same
    mean for k uniform in 0 .. Q (Ghadimi & Wang 2018, Algorithm 3).
    """
    if randomly is not None:
        for draw in draws[:randomly]:
            b = tree.axpy(-step_size, oracles.hessian(at.upper, at.lower, b, draw), b)
        return tree.scale(step_size * (len(draws) + 1), b)
    total = b
    for draw in draws:
        total = tree.add(b, tree.axpy(-step_size, oracles.hessian(at.upper, at.lower, total, draw), total))
    return tree.scale(step_size, total)


def sampled(oracles: Oracles, at: Point, v: Params, above: FirstDerivatives, lower: Draw) -> Hypergradient:
    """The hypergradient with v in place of the system's solution and the cross term on one sample."""
    below = oracles.lower(at.upper, at.lower, v, lower)
    implicit = tree.scale(-1.0, below.cross)
    total, gradient = tree.add(above.upper, implicit), {name: below.gradient[name] for name in oracles.names}
    stationarity, sound = tree.read(tree.norm(gradient), tree.finite(total))
    failure = None if sound else _NOT_FINITE
    return Hypergradient(total, above.upper, implicit, above.value, None, stationarity, failure=failure)


def random_length(step: UpperStep, terms: int) -> int:
    """A number uniform in 0 .. terms, a function of the step's number and samples alone; the same on all ranks."""
    seed = hash((step.number, *(draw.seed for draw in step.lower_draws)))
    generator = torch.Generator().manual_seed(seed % 2**63)
    return distributed.from_first_rank(int(torch.randint(terms + 1, (), generator=generator)))


_NOT_FINITE = (
    "non-finite: the sampled hypergradient is not finite; lower step_size or the lower learning rate, or check the data"
)


@dataclass(frozen=True, eq=False)
class SeriesLoop(SingleLoop):
    """The adjoint variable comes from a Neumann series on samples, anew in each step.

    Args:
        step_size: eta of the series, > 0, below 2 over the largest eigenvalue of any sample's d2G/dydy.
        terms: Q >= 1, its length.
    """

    step_size: float
    terms: int = field(default=10, kw_only=True)

    one_term: ClassVar[bool] = False
    """Whether one random term stands for the series (`neumann`)."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_number(f"{name}: step_size", self.step_size, positive=True)
        check_count(f"{name}: terms", self.terms, least=1)

    @property
    def lower_draws(self) -> int:
        return self.terms + 1

    def adjoint(self, oracles: Oracles, at: Point, b: Params, step: UpperStep) -> Params:
        """About A^-1 b from all samples but the last."""
        length = random_length(step, self.terms) if self.one_term else None
        return neumann(oracles, at, b, step.lower_draws[:-1], self.step_size, randomly=length)


@dataclass(frozen=True, eq=False)
class SeriesHypergradient(SeriesLoop):
    """A hypergradient by the series after the schedule's lower steps."""

    moves_lower = False

    def estimate(self, oracles: Oracles, at: Point, state: MethodState, step: UpperStep) -> Estimate:
        above = oracles.upper(at.upper, at.lower, step.upper_draws[0])
        v = self.adjoint(oracles, at, above.lower, step)
        found = sampled(oracles, at, v, above, step.lower_draws[-1])
        return Estimate(found.loss, Point(found.grad, {}, {}), {}, result=found)


@dataclass(frozen=True, eq=False)
class RecursiveMomentum(SeriesLoop):
    r"""Both levels go along recursive momenta (`storm`),

    .. math:: d_t = D(\xi_t; x_t, y_t) + (1 - \eta_t) \left(d_{t-1} - D(\xi_t; x_{t-1}, y_{t-1})\right), \qquad
       \eta_t = \frac{\text{momentum}}{(t + 1)^{\text{decay}}}.

    Args:
        momentum: in (0, 1].
        decay: >= 0; the papers' rates decay as t^(-1/3) (`power_decay`), and the momentum as t^(-2/3).
    """

    momentum: float = field(default=0.5, kw_only=True)
    decay: float = field(default=2 / 3, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        check_number(f"{name}: momentum", self.momentum, positive=True, most=1.0)
        check_number(f"{name}: decay", self.decay)

    def estimate(self, oracles: Oracles, at: Point, state: MethodState, step: UpperStep) -> Estimate:
        count = state.get("count", 0)
        loss, direction = self._directions(oracles, at, step)
        if "point" in state:
            eta = self.momentum / (count + 1) ** self.decay
            _, old = self._directions(oracles, Point.of_state(state["point"], at), step)
            before = Point.of_state(state["direction"], at)
            parts = zip(direction, old, before, strict=True)
            direction = Point(*(storm(new, former, carried, eta) for new, former, carried in parts))
        following = {"count": count + 1, "point": at.as_state(), "direction": direction.as_state()}
        return Estimate(loss, direction, following)

    def _directions(self, oracles: Oracles, at: Point, step: UpperStep) -> tuple[Tensor, Point]:
        above = oracles.upper(at.upper, at.lower, step.upper_draws[0])
        v = self.adjoint(oracles, at, above.lower, step)
        below = oracles.lower(at.upper, at.lower, v, step.lower_draws[-1])
        return above.value, Point(tree.sub(above.upper, below.cross), below.gradient, {})
