"""The hypergradient by reverse mode through the steps of the lower level."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, final

import torch

from bilevel import distributed, tree
from bilevel.checks import check_count, check_kind
from bilevel.hypergradients.method import Method, MethodState, Proposal, Setup, UpperStep
from bilevel.hypergradients.result import Hypergradient, joined
from bilevel.hypergradients.updates.torch_updates import from_optimizer
from bilevel.hypergradients.updates.update import State, Update, carry, differentiable, limited, starting_state
from bilevel.lower import (
    Selection,
    check_selection,
    examine_cross,
    examine_curvature,
    lower_derivatives,
    lower_value,
    selected,
    training_derivatives,
    under_autocasts,
    upper_derivatives,
)
from bilevel.problem import Problem
from bilevel.products import ReverseOverReverse
from bilevel.tree import Params

Rule = Update | Callable[[Params], Update]
"""An optimizer step, or a function of the upper variables that makes one."""


@final
@dataclass(frozen=True, eq=False)
class Unrolled(Method):
    r"""The derivative of F(x, y_T(x)), with y_T the lower variables after T optimizer steps:

    .. math:: (y_{t+1}, s_{t+1}) = U\big(y_t, \nabla_y G_t(x, y_t), s_t\big), \quad t = 0, \dots, T - 1, \qquad
       \frac{dF}{dx} = \frac{\partial F}{\partial x} + \frac{d y_T}{dx}^{\!\top} \frac{\partial F}{\partial y_T}

    with G_t = L + lambda r on the t-th lower batch (Franceschi et al. 2017, reverse mode; Shaban et al. 2019,
    truncated). From an exact optimum, K steps of plain descent give what ``Neumann(K, scale=lr)`` gives, and more steps
    approach the implicit hypergradient.

    In a `Trainer` the steps are those that the trainer has made, with its live optimizer, its norm limit and the same
    random masks; they are recorded and replayed one after the other, each from where it really started. One upper step
    an alternation can be made, since the steps belong to the upper variables that they were made with. A replay that
    ends elsewhere than the step did (a hook that moves the lower variables, an objective that is not a function of its
    arguments) is a `Hypergradient.failure`. Steps under autocast (`bilevel.nn.training_autocast`) are differentiated in
    the variables' own precision, and made once more in that of training for this comparison.

    In `hypergradient`, T steps of `update` are made from `lower`, one a lower batch; nothing is written, the Problem's
    hooks are not called, and the new lower variables are the result's `lower`. One-step differentiation (Bolte, Pauwels
    & Vaiter 2023) is a single step from lower variables that have converged; its relative error is about the
    contraction factor of that step, so it suits fast lower optimizers.

    The result's `solution` is None, its `stationarity` the norm of dG/dy at y_T on the last batch alone (all batches
    would cost T more gradients). With several ranks gradients are means over them.

    Args:
        update: the optimizer step, for `hypergradient`. A function of the upper variables makes options upper variables
            too, for example ``lambda x: SGDUpdate(lr=x["log_lr"].exp())``. None in a trainer, whose steps are the live
            optimizer's.
        state: of `update` at the start, for example from `from_optimizer`; default ``update.init(lower)``.
        steps: differentiate through the last K steps only; the steps before make no graph. None goes through all.
        recompute: keep only the iterates and the seeds of their random masks, and rebuild the graph of one step at a
            time on the way back: the memory of one graph instead of K, for one more gradient a step. Same result.
        implicit: as for `linearize`. Other lower variables take part in the steps, but their movement is not
            differentiated.
        started_from: lower name -> upper name that y_0 was copied from (MAML), whose derivative is then included. In a
            trainer `Problem.reset_lower` copies it.

    Raises:
        TypeError: an `update` that is not one.
        ValueError: `steps` below 1; `started_from` with names that do not fit or with `steps` that leave some out; a
            trainer whose steps cannot be replayed (several upper steps or no lower ones an alternation, an adaptation,
            chunks, an optimizer that `from_optimizer` refuses, an `update` of one's own).
    """

    update: Rule | None = None
    state: State | None = None
    steps: int | None = field(default=None, kw_only=True)
    recompute: bool = field(default=False, kw_only=True)
    implicit: Selection | None = field(default=None, kw_only=True)
    started_from: Mapping[str, str] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "implicit", check_selection("Unrolled", self.implicit))
        check_kind("Unrolled: recompute", self.recompute, bool, "True or False")
        check_kind("Unrolled: state", self.state, (Mapping, NoneType), "the state that from_optimizer gave, or None")
        check_kind(
            "Unrolled: started_from", self.started_from, (Mapping, NoneType), "lower name -> upper name, or None"
        )
        if self.state is not None and self.update is None:
            raise ValueError("Unrolled: a state belongs to an update; pass the update too, or leave the state out")
        known = isinstance(self.update, Update) or (callable(self.update) and not isinstance(self.update, type))
        if not (self.update is None or known):
            raise TypeError(
                "Unrolled: update must be an Update or a function of the upper variables that makes one, got "
                f"{self.update!r}"
            )
        if self.steps is not None:
            check_count("Unrolled: steps", self.steps, least=1)

    @property
    def stored_batches(self) -> int:
        return 0

    @property
    def replayed_steps(self) -> int | None:
        return self.steps

    def check(self, setup: Setup) -> None:
        names = selected(setup.problem, setup.lower, self.implicit)
        if self.update is not None or self.state is not None:
            raise ValueError(
                "Unrolled: update and state are for `hypergradient`; a trainer replays the steps of its own lower "
                "optimizer, so leave them out"
            )
        if setup.upper_steps > 1:
            raise ValueError(
                f"Unrolled: the schedule has upper_steps={setup.upper_steps}, but the lower steps of an alternation "
                "belong to the upper variables that they were made with; set upper_steps to 1"
            )
        if setup.adapts:
            raise ValueError(
                "Unrolled: the schedule adapts upper variables between the levels, so that the lower steps were not "
                "made with them; leave adaptation_every out, or use another method"
            )
        if setup.lower_steps < max(self.steps or 1, 1):
            raise ValueError(
                f"Unrolled: steps={self.steps} cannot be replayed of lower_steps={setup.lower_steps}; make more lower "
                "steps an alternation, or lower `steps`"
            )
        if setup.micro_batch is not None:
            raise ValueError(
                "Unrolled: micro_batch saves the memory of whole batches, which a replay needs; leave it out, or use "
                "another method"
            )
        from_optimizer(setup.lower_optimizer, setup.lower)
        self._pairs(setup.upper, setup.lower, names, complete=self.steps in (None, setup.lower_steps))

    def propose(self, step: UpperStep, state: MethodState, prepared: Any) -> Proposal:
        names = selected(step.problem, step.lower, self.implicit)
        trajectory = _Trajectory(step.problem, step.upper, names, step.watch)
        if step.lower_steps is None:
            made, end = self._make_steps(step, trajectory)
            complete = len(made) == len(step.lower_batches)
        else:
            # Whether these are all of the alternation's was checked when the trainer was made.
            made, end, complete = self._recorded_steps(step, trajectory), tree.detach(step.lower), True
        if not made:
            return _nothing_to_replay(step, names)
        pairs, last = self._pairs(step.upper, step.lower, names, complete=complete), made[-1].point
        if pairs or not isinstance(self.update, (Update, NoneType)):
            # The upper variables stand in the steps, in no objective perhaps.
            examine_cross(step.problem, set(step.upper), step.upper)

        loss, direct, v = upper_derivatives(step.problem, step.upper, end, names, step.upper_batch)
        response, start = trajectory.sweep(made, v)
        for lower_name, upper_name in pairs.items():
            response[upper_name] = response[upper_name] + start[lower_name]
        grad = tree.add(direct, response)
        curvature = examine_curvature(step.problem, step.upper, end, last.batch, names, ReverseOverReverse())
        step.watch()
        gradient = lower_derivatives(step.problem, step.upper, end, names, last.batch, last.seed + 1)[1]
        stationarity, sound = tree.read(tree.norm(gradient), tree.finite(grad))
        failure = joined(curvature.lost(), trajectory.diverted if sound else _not_finite(end, v))
        result = Hypergradient(grad, direct, response, loss, None, stationarity, lower=end, failure=failure)
        return Proposal(grad, loss, {}, result)

    def _make_steps(self, step: UpperStep, trajectory: "_Trajectory") -> tuple[list["_Step | _Replay"], Params]:
        """Steps of `update` from `lower` on, one a batch: what is needed of the last ones, and where they end."""
        if self.update is None:
            raise ValueError("Unrolled: update is missing; there is no lower optimizer here whose steps it could take")
        lower, seed, count = tree.detach(step.lower), int(torch.randint(2**31 - 1, ())), len(step.lower_batches)
        with torch.no_grad():
            state = starting_state(trajectory.rule(self.update), lower, self.state)
        kept: list[_Step | _Replay] = []
        for t, batch in enumerate(step.lower_batches):
            step.watch()
            point = _Point(lower, self.update, state, batch, seed + t)
            through = self.steps is None or t >= count - self.steps
            if through and not self.recompute:
                made, lower, state = trajectory.record(point)
                kept.append(made)
            else:
                lower, state = trajectory.advance(point)
                kept += [_Replay(point)] if through else []
        return kept, lower

    def _recorded_steps(self, step: UpperStep, trajectory: "_Trajectory") -> list["_Step | _Replay"]:
        """The steps that the trainer has made, with their graphs or to be replayed one at a time."""
        assert step.lower_steps is not None
        after = [made.lower for made in step.lower_steps[1:]] + [tree.detach(step.lower)]
        replays = [
            _Replay(_Point(**{item.name: getattr(made, item.name) for item in fields(made)}), end)
            for made, end in zip(step.lower_steps, after, strict=True)
        ]
        # A graph that is kept while the Problem is put into another state could be of neither.
        if self.recompute or any(made.problem for made in step.lower_steps):
            return list(replays)
        return [trajectory.replayed(replay) for replay in replays]

    def _pairs(self, upper: Params, lower: Params, names: Sequence[str], *, complete: bool) -> dict[str, str]:
        """Lower name -> upper name of the pairs, none where there is no mapping."""
        pairs = dict(self.started_from or {})
        if pairs and not complete:
            raise ValueError("started_from needs the derivative through all the steps; leave `steps` out")
        for lower_name, upper_name in pairs.items():
            if lower_name not in names or upper_name not in upper:
                raise ValueError(
                    f"started_from: no implicit lower variable {lower_name!r} or no upper {upper_name!r}; there are "
                    f"{list(names)} and {list(upper)}"
                )
            if lower[lower_name].shape != upper[upper_name].shape:
                raise ValueError(
                    f"started_from: lower {lower_name!r} has shape {tuple(lower[lower_name].shape)} but upper "
                    f"{upper_name!r} {tuple(upper[upper_name].shape)}"
                )
        return pairs


@dataclass(frozen=True)
class _Point:
    """All that a step is made of; fields as of `LowerStep`."""

    lower: Params
    update: Rule
    state: State
    batch: Any
    seed: int
    max_grad_norm: float | None = None
    problem: Mapping[str, Any] = field(default_factory=dict)
    autocast: Mapping[str, torch.dtype] | None = None


@dataclass(frozen=True)
class _Replay:
    """A step whose graph is built when the way back comes to it; `end` is where it led, None where nobody knows."""

    point: _Point
    end: Params | None = None


@dataclass(frozen=True)
class _Step:
    """A step with the graphs of its two halves: this rank's gradient, and the update with the mean over the ranks.

    `start` and `end` hold the responding variables and their state, each under its slot and name (see `carry`).
    """

    point: _Point
    lower: Params
    local: Params
    mean: Params
    start: Params
    end: Params


class _Trajectory:
    """The steps, forwards and backwards, as functions of the upper variables.

    Attributes:
        diverted: in words, where a replayed step did not end where the step had ended.
    """

    def __init__(self, problem: Problem, upper: Params, names: Sequence[str], watch: Callable[[], None]) -> None:
        self.problem, self.names, self.watch = problem, names, watch
        self.x = tree.as_variables(upper)
        self.diverted: str | None = None

    def rule(self, update: Rule) -> Update:
        made = update if isinstance(update, Update) else update(self.x)
        if not isinstance(made, Update):
            raise TypeError(f"update must make an Update from the upper variables, got {type(made).__name__}")
        return made

    def advance(self, point: _Point) -> tuple[Params, State]:
        """Where the step leads, without a graph."""
        y = tree.as_variables(point.lower)
        with torch.enable_grad():
            value = lower_value(self.problem, tree.detach(self.x), y, point.batch, point.seed)
        gradient = distributed.mean_over_ranks(tree.gradients(value, y))
        with torch.no_grad():
            return self.rule(point.update).step(point.lower, gradient, point.state)

    @torch.enable_grad()
    def record(self, point: _Point) -> tuple[_Step, Params, State]:
        """The step with its graphs, and where it ends."""
        y = tree.as_variables(point.lower)
        value = lower_value(self.problem, self.x, y, point.batch, point.seed)
        local = tree.gradients(value, y, create_graph=True)
        mean = tree.as_variables(distributed.mean_over_ranks(tree.detach(local)))
        state = {slot: self._as_variables(slot, values) for slot, values in point.state.items()}
        lower, after = self.rule(point.update).step(y, limited(mean, point.max_grad_norm), state)
        step = _Step(
            point,
            lower={name: y[name] for name in self.names},
            local={name: local[name] for name in self.names},
            mean={name: mean[name] for name in self.names},
            start=carry(y, state, self.names),
            end=carry(lower, after, self.names),
        )
        return step, tree.detach(lower), {slot: tree.detach(values) for slot, values in after.items()}

    def replayed(self, replay: _Replay) -> _Step:
        """The step with its graphs, compared with where it really led."""
        self.watch()
        step, end, _ = self.record(replay.point)
        if replay.end is not None:
            end = end if replay.point.autocast is None else self._made_again(replay.point)
            self._compare(end, replay.end, replay.point.lower)
        return step

    def _made_again(self, point: _Point) -> Params:
        """Where the step leads in the precision of training."""
        x, y, seed = self.x, point.lower, point.seed
        with under_autocasts(point.autocast or {}):
            gradient = training_derivatives(self.problem, x, y, point.batch, seed=seed, write_buffers=False)[1]
        with torch.no_grad():
            return self.rule(point.update).step(y, limited(gradient, point.max_grad_norm), point.state)[0]

    def sweep(self, kept: list[_Step | _Replay], v: Params) -> tuple[Params, Params]:
        """``(d y_T / d x)' v`` over the upper variables, and ``(d y_T / d y_start)' v``; empties `kept` as it goes."""
        adjoint = carry(v, {}, self.names)
        response = tree.zeros_like(tree.detach(self.x))
        while kept:
            item = kept.pop()
            with _problem_as(self.problem, item.point.problem):
                # No name for the step here: it would keep one graph alive while the next is built.
                adjoint, part = self._pull(item if isinstance(item, _Step) else self.replayed(item), adjoint)
            response = tree.add(response, part)
        return response, {name: adjoint[f"/{name}"] for name in self.names}

    def _pull(self, step: _Step, adjoint: Params) -> tuple[Params, Params]:
        """One step of the adjoint recursion: the adjoint at the step's start, and the step's own part in x."""
        end = {key: leaf for key, leaf in step.end.items() if key in adjoint}
        before, w, direct = tree.pullback(end, adjoint, [step.start, step.mean, self.x])
        y, x = tree.pullback(step.local, w, [step.lower, self.x])
        for name, leaf in distributed.mean_over_ranks(y).items():
            before[f"/{name}"] = before[f"/{name}"] + leaf
        return before, tree.add(direct, distributed.mean_over_ranks(x))

    def _as_variables(self, slot: str, values: Params) -> Params:
        return {n: t.detach().requires_grad_(n in self.names and differentiable(slot, t)) for n, t in values.items()}

    def _compare(self, end: Params, really: Params, start: Params) -> None:
        """Take note of a replay that went elsewhere by more than rounding and a hundredth of the step explain."""
        rounding = max(torch.finfo(leaf.dtype).eps for leaf in end.values()) ** 0.75
        distances = tree.norm(tree.sub(end, really)), tree.norm(tree.sub(really, start))
        apart, moved, size = tree.read(*distances, tree.norm(really))
        if apart > 0.01 * moved + rounding * size:
            self.diverted = (
                f"not replayed: a lower step that moved the variables by {moved:.2e} was {apart:.2e} away from where "
                "it had led, so that this is the derivative of other steps; let no hook move the lower variables, make "
                "the lower objective a function of its arguments and the Problem's state_dict, or take another method"
            )


def _nothing_to_replay(step: UpperStep, names: Sequence[str]) -> Proposal:
    """A step along the direct part, where no lower step of the alternation was made."""
    loss, direct, _ = upper_derivatives(step.problem, step.upper, step.lower, names, step.upper_batch)
    failure = "not unrolled: every lower step of this alternation was left out, so that the implicit part is missing"
    missing = tree.zeros_like(direct)
    return Proposal(direct, loss, {}, Hypergradient(direct, direct, missing, loss, None, math.nan, failure=failure))


@contextmanager
def _problem_as(problem: Problem, state: Mapping[str, Any]) -> Iterator[None]:
    """The Problem with what it kept at another time; nothing where it keeps nothing."""
    if not state:
        return (yield)
    now = copy.deepcopy(problem.state_dict())
    problem.load_state_dict(copy.deepcopy(state))
    try:
        yield
    finally:
        problem.load_state_dict(now)


def _not_finite(end: Params, v: Params) -> str:
    if not tree.all_finite(end):
        return (
            "non-finite: the lower steps left the finite numbers, so the hypergradient is not finite either; lower the "
            "learning rate of the update, or check the data"
        )
    if not tree.all_finite(v):
        return "non-finite: dF/dy is not finite at the last lower iterate; check the upper objective and its data"
    return (
        "non-finite: the derivative through the lower steps is not finite though the steps are; look for a root or a "
        "norm at zero in the lower objective or the update, or for adjoints that grow (truncate, or lower the rate)"
    )
