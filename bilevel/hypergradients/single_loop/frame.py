"""The frame of stochastic methods: directions at one point, from samples drawn for the step."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import tree
from bilevel.checks import check_number, warn_outside
from bilevel.hypergradients.method import Method, MethodState, Proposal, Setup, UpperStep
from bilevel.hypergradients.result import Hypergradient, SolverError, SolverWarning
from bilevel.lower import Draw, Oracles, examine_curvature, repeatable, selected
from bilevel.nn import curvature_pass
from bilevel.products import ReverseOverReverse
from bilevel.tree import Params


class Point(NamedTuple):
    """Upper variables x, lower variables y and the adjoint variable v; or a direction for each of them."""

    upper: Params
    lower: Params
    v: Params

    def plus(self, alpha: float | Tensor, other: "Point") -> "Point":
        """``self + alpha * other``."""
        return Point(*(tree.axpy(alpha, theirs, own) for own, theirs in zip(self, other, strict=True)))

    def as_state(self) -> MethodState:
        """Copies for a `MethodState`: variables change in place."""
        return {name: {n: leaf.detach().clone() for n, leaf in part.items()} for name, part in self._asdict().items()}

    @staticmethod
    def of_state(state: MethodState, like: "Point") -> "Point":
        """Inverse of `as_state`, on the devices of a point."""
        places = {**like.lower, **like.v}
        parts = [state["upper"], state["lower"], state["v"]]
        devices = [like.upper, like.lower, places]
        return Point(
            *(
                {name: leaf.to(where[name].device) for name, leaf in part.items()}
                for part, where in zip(parts, devices, strict=True)
            )
        )


class Estimate(NamedTuple):
    """What a method makes of its samples.

    Attributes:
        loss: F on the upper samples.
        direction: for x, y and v; {} for y where the method does not move it, and for v where it keeps none.
        state: what is carried on beside v.
        checked: tensors of the state that a NaN or an infinity may have come into.
        commit: writes to tensors of the state in place, once the step is made.
        result: where the direction of x stands by itself for a hypergradient.
    """

    loss: Tensor
    direction: Point
    state: MethodState
    checked: tuple[Tensor, ...] = ()
    commit: Callable[[], None] = lambda: None
    result: Hypergradient | None = None


@dataclass(frozen=True, eq=False)
class SingleLoop(Method):
    r"""One step of x, y and v each time, along estimates of the three directions

    .. math:: D_y = \frac{\partial G}{\partial y}, \qquad
       D_v = \frac{\partial^2 G}{\partial y^2} v - \frac{\partial F}{\partial y}, \qquad
       D_x = \frac{\partial F}{\partial x} - \frac{\partial^2 G}{\partial x \partial y} v

    at (x, y, v), whose common zero is the solution: there v solves the linear system of the implicit function theorem
    (Dagréou, Ablin, Vaiter & Moreau 2022, section 2; G = L + lambda r). A subclass estimates them from samples.

    In a `Trainer` the upper optimizer goes along D_x and the lower one along D_y, so that rates, momentum and norm
    limits are those of the levels; v makes a plain step of `v_ratio` times the lower learning rate. The schedule has no
    lower steps: ``AlternatingSchedule(alternations=T, lower_steps=0, upper_steps=N)`` makes T N steps, and tells
    callbacks and checkpoints after every N. `Problem.reset_lower` sets v and all else that is carried to zero.

    Args:
        v_ratio: the learning rate of v over that of the lower optimizer, so that both decay together.

    Raises:
        ValueError: a number out of its range.
    """

    v_ratio: float = field(default=1.0, kw_only=True)

    moves_lower = True

    def __post_init__(self) -> None:
        check_number(f"{type(self).__name__}: v_ratio", self.v_ratio, positive=True)

    @property
    def stored_batches(self) -> int:
        return 0

    @property
    def lower_draws(self) -> int:
        return 1

    def check(self, setup: Setup) -> None:
        name = type(self).__name__
        selected(setup.problem, setup.lower, None)
        if self.moves_lower and setup.lower_steps:
            raise ValueError(
                f"schedule: lower_steps={setup.lower_steps}, but {name} moves the lower variables in its upper steps; "
                "set lower_steps=0, and the number of steps between two checkpoints as upper_steps"
            )
        if self.moves_lower and setup.micro_batch is not None:
            raise ValueError(f"lower: {name} takes a batch at once; leave micro_batch out, and draw smaller batches")

    def v_rate(self, step: UpperStep) -> float:
        """The learning rate of v.

        Raises:
            ValueError: there is no lower optimizer whose rate it goes by.
        """
        if step.lower_rate is None:
            raise ValueError(
                f"{type(self).__name__}: v goes by the lower optimizer's learning rate, and there is none here; use "
                "this method in a Trainer"
            )
        return self.v_ratio * step.lower_rate

    def start(self, step: UpperStep, names: tuple[str, ...]) -> Params:
        """Where v begins: at 0, over the lower variables that respond to the upper ones."""
        return tree.zeros_like({name: step.lower[name].detach() for name in names})

    def prepare(self, step: UpperStep, state: MethodState) -> tuple[str, ...]:
        return selected(step.problem, step.lower, None)

    def propose(self, step: UpperStep, state: MethodState, prepared: Any) -> Proposal:
        names: tuple[str, ...] = prepared
        if "v" not in state:
            _examine(step, names)
        v = state["v"] if "v" in state else self.start(step, names)
        at = Point(step.upper, step.lower, {name: leaf.to(step.lower[name].device) for name, leaf in v.items()})

        def estimate(seeded: bool) -> Estimate:
            writes = self.moves_lower
            return self.estimate(Oracles(step.problem, names, seeded=seeded, write_buffers=writes), at, state, step)

        step.watch()
        with curvature_pass():
            found = repeatable(step.problem, estimate, lambda: _probe(step))
        ahead = at.v
        if found.direction.v:
            ahead = tree.axpy(-self.v_rate(step), found.direction.v, at.v)
        return Proposal(
            found.direction.upper,
            found.loss,
            {"v": ahead, **found.state},
            found.result,
            lower_gradient=found.direction.lower if self.moves_lower else None,
            checked=(*ahead.values(), *found.checked),
            commit=found.commit,
        )

    @abstractmethod
    def estimate(self, oracles: Oracles, at: Point, state: MethodState, step: UpperStep) -> Estimate:
        """Directions at a point from the step's samples, and the state that is carried on beside v."""


def directions(oracles: Oracles, at: Point, lower: Draw, upper: Draw) -> tuple[Tensor, Point]:
    """F and the three directions on one sample of each level: a gradient, a Hessian-vector product and a cross product
    below, a gradient above."""
    below = oracles.lower(at.upper, at.lower, at.v, lower)
    above = oracles.upper(at.upper, at.lower, upper)
    return above.value, Point(tree.sub(above.upper, below.cross), below.gradient, tree.sub(below.product, above.lower))


def _examine(step: UpperStep, names: tuple[str, ...]) -> None:
    """Say once for a Problem what its second derivatives lose."""
    batch = step.lower_draws[0].batch
    lost = examine_curvature(step.problem, step.upper, step.lower, batch, names, ReverseOverReverse()).lost()
    if lost is not None and step.on_failure == "raise":
        raise SolverError(lost, None)
    if lost is not None and step.on_failure == "warn":
        warn_outside(lost, SolverWarning)


@torch.no_grad()
def _probe(step: UpperStep) -> None:
    """One pass of each objective that writes nothing."""
    problem, upper, lower = step.problem, tree.detach(step.upper), tree.detach(step.lower)
    problem.lower_objective(upper, lower, step.lower_draws[0].batch)
    problem.regularizer(upper, lower)
    problem.upper_objective(upper, lower, step.upper_draws[0].batch)
