"""The frame of stochastic methods: directions at one point, from samples drawn for the step."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import tree
from bilevel.checks import check_kind, check_number, warn_outside
from bilevel.hypergradients.method import Method, MethodState, Proposal, Setup, UpperStep
from bilevel.hypergradients.result import Hypergradient, SolverError, SolverWarning, joined
from bilevel.lower import Draw, Oracles, all_repeatable, draws, examine_curvature, selected
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
    limits are those of the levels. The schedule has no lower steps: ``AlternatingSchedule(alternations=T,
    lower_steps=0, upper_steps=N)`` makes T N steps, and tells callbacks and checkpoints after every N.
    `Problem.reset_lower` clears v and all else that is carried.

    Args:
        compile: True takes all passes but those of the run's first step through torch.compile, which pays for small
            problems of many steps; a string names its backend. For objectives that it can take whole, draw no random
            numbers and write no buffers: plain operations of tensors, modules by torch.func.functional_call (not by
            `bilevel.functional_call`).

    Raises:
        TypeError: a `compile` that is neither.
        ValueError: objectives that draw random numbers, with `compile`.
        RuntimeError: objectives that torch.compile cannot take.
    """

    compile: bool | str = field(default=False, kw_only=True)

    moves_lower = True

    takes_products = True
    """Whether second derivatives are taken, which are then examined for lost curvature."""

    @property
    def stored_batches(self) -> int:
        return 0

    @property
    def lower_draws(self) -> int:
        return 1

    def check(self, setup: Setup) -> None:
        name = type(self).__name__
        check_kind(f"{name}: compile", self.compile, (bool, str), "True, False or the name of a backend")
        selected(setup.problem, setup.lower, None)
        if self.moves_lower and setup.lower_steps:
            raise ValueError(
                f"schedule: lower_steps={setup.lower_steps}, but {name} moves the lower variables in its upper steps; "
                "set lower_steps=0, and the number of steps between two checkpoints as upper_steps"
            )
        if self.moves_lower and setup.micro_batch is not None:
            raise ValueError(f"lower: {name} takes a batch at once; leave micro_batch out, and draw smaller batches")

    def start(self, step: UpperStep, names: tuple[str, ...]) -> Params:
        """Where v begins; {} where none is carried."""
        return {}

    def moved(self, v: Params, direction: Params, step: UpperStep) -> Params:
        """v after the step."""
        return v

    def propose(self, step: UpperStep, state: MethodState, prepared: Any) -> Proposal:
        v = state.get("v")
        names = tuple(v) if v else selected(step.problem, step.lower, None)
        lost = self._lost(step, names)
        v = self.start(step, names) if v is None else v
        at = Point(step.upper, step.lower, {name: leaf.to(step.lower[name].device) for name, leaf in v.items()})
        oracles = Oracles(
            step.problem, names, write_buffers=self.moves_lower, watch=step.watch, backend=self._backend(step)
        )
        with curvature_pass():
            found = all_repeatable(step.problem, lambda: self.estimate(oracles, at, state, step))
        ahead = self.moved(at.v, found.direction.v, step)
        return Proposal(
            found.direction.upper,
            found.loss,
            {"v": ahead, **found.state},
            found.result and replace(found.result, failure=joined(lost, found.result.failure)),
            lower_gradient=found.direction.lower if self.moves_lower else None,
            checked=(*ahead.values(), *found.checked),
            commit=found.commit,
        )

    @abstractmethod
    def estimate(self, oracles: Oracles, at: Point, state: MethodState, step: UpperStep) -> Estimate:
        """Directions at a point from the step's samples, and the state that is carried on beside v."""

    def _backend(self, step: UpperStep) -> str | None:
        """Of torch.compile. A first step goes without, since only plain passes are examined."""
        if not self.compile:
            return None
        drawing = draws(step.problem)
        if drawing:
            raise ValueError(
                f"{type(self).__name__}: compile={self.compile!r} is for objectives that draw no random numbers, and "
                f"those of {type(step.problem).__name__} do (dropout, noise); leave compile out"
            )
        if step.number == 1 or drawing is None:
            return None
        return "inductor" if self.compile is True else self.compile

    def _lost(self, step: UpperStep, names: tuple[str, ...]) -> str | None:
        """What second derivatives lose, in words; a run of directions that are no hypergradient is told at its first
        step."""
        if not self.takes_products or (self.moves_lower and step.number > 1):
            return None
        batch, provider = step.lower_draws[0].batch, ReverseOverReverse()
        lost = examine_curvature(step.problem, step.upper, step.lower, batch, names, provider).lost()
        if self.moves_lower and lost is not None and step.on_failure == "raise":
            raise SolverError(lost, None)
        if self.moves_lower and lost is not None and step.on_failure == "warn":
            warn_outside(lost, SolverWarning)
        return lost


@dataclass(frozen=True, eq=False)
class AdjointLoop(SingleLoop):
    """A single loop that carries v, which makes plain steps of `v_ratio` times the lower learning rate, from 0.

    Args:
        v_ratio: > 0, the learning rate of v over that of the lower optimizer, so that both decay together. 1 is for SGD
            below, whose rate suits the Hessian; the rate of an adaptive optimizer says nothing of it, and a trainer
            warns.

    Raises:
        ValueError: a number out of its range; no lower optimizer whose rate v goes by.
    """

    v_ratio: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        check_number(f"{type(self).__name__}: v_ratio", self.v_ratio, positive=True)

    def check(self, setup: Setup) -> None:
        super().check(setup)
        optimizer = setup.lower_optimizer
        if self.v_ratio == 1.0 and not isinstance(optimizer, torch.optim.SGD):
            warn_outside(
                f"{type(self).__name__}: v makes plain steps of v_ratio=1 times the lower learning rate "
                f"({optimizer.param_groups[0]['lr']:g}), which for {type(optimizer).__name__} is no step along a "
                "gradient: v may lag far behind, and the direction of x with it. Pass a v_ratio by which that product "
                "is near 1 over the largest eigenvalue of d2G/dydy, or take torch.optim.SGD below"
            )

    def v_rate(self, step: UpperStep) -> float:
        """The learning rate of v."""
        if step.lower_rate is None:
            raise ValueError(
                f"{type(self).__name__}: v goes by the lower optimizer's learning rate and is carried from step to "
                "step, and there is no optimizer here; use this method in a Trainer"
            )
        return self.v_ratio * step.lower_rate

    def start(self, step: UpperStep, names: tuple[str, ...]) -> Params:
        return tree.zeros_like({name: step.lower[name].detach() for name in names})

    def moved(self, v: Params, direction: Params, step: UpperStep) -> Params:
        return tree.axpy(-self.v_rate(step), direction, v)


def directions(oracles: Oracles, at: Point, lower: Draw, upper: Draw) -> tuple[Tensor, Point]:
    """F and the three directions on one sample of each level: a gradient, a Hessian-vector product and a cross product
    below, a gradient above."""
    below = oracles.lower(at.upper, at.lower, at.v, lower)
    above = oracles.upper(at.upper, at.lower, upper)
    return above.value, Point(tree.sub(above.upper, below.cross), below.gradient, tree.sub(below.product, above.lower))
