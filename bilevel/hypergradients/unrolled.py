"""The hypergradient by reverse mode through the steps of the lower level."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bilevel import distributed, tree
from bilevel.hypergradients.hypergradient import Hypergradient, OnFailure, check_on_failure, report_failure
from bilevel.hypergradients.system import Implicit, check_batches, implicit_names
from bilevel.hypergradients.updates import State, Update, starting_state
from bilevel.lower import lower_derivatives, lower_value, upper_derivatives
from bilevel.problem import Problem
from bilevel.tree import Params


def unrolled_hypergradient(
    problem: Problem,
    upper: Params,
    lower: Params,
    *,
    upper_batch: Any,
    lower_batches: Sequence[Any],
    update: Update | Callable[[Params], Update],
    state: State | None = None,
    truncation: int | None = None,
    recompute: bool = False,
    implicit: Implicit | None = None,
    started_from: Mapping[str, str] | None = None,
    on_failure: OnFailure = "warn",
) -> Hypergradient:
    r"""Hypergradient of F(x, y_T(x)), with y_T the lower variables after T optimizer steps:

    .. math:: (y_{t+1}, s_{t+1}) = U\big(y_t, \nabla_y G_t(x, y_t), s_t\big), \quad t = 0, \dots, T - 1, \qquad
       \frac{dF}{dx} = \frac{\partial F}{\partial x} + \frac{d y_T}{dx}^{\!\top} \frac{\partial F}{\partial y_T}

    with G_t = L + lambda r on the t-th of `lower_batches` (Franceschi et al. 2017, reverse mode; Shaban et al. 2019,
    truncated). From an exact optimum, K steps of plain descent give what ``Neumann(K, scale=lr)`` gives, and more steps
    approach the implicit hypergradient. Nothing is written: no variable, no ``.grad``, no buffer of a module that is
    bound by `functional_call`; the Problem's hooks are not called. The new lower variables are the result's `lower`.

    One-step differentiation (Bolte, Pauwels & Vaiter 2023) is a single step from lower variables that have converged:
    ``unrolled_hypergradient(..., lower_batches=[batch], update=SGDUpdate(lr))``. Its relative error is about the
    contraction factor of that step, so it suits fast lower optimizers.

    Args:
        upper, lower: x, and the lower variables y_0 that the steps start from. y_0 is a constant; see `started_from`.
        lower_batches: one lower step for each, in order.
        update: the optimizer step. A function of the upper variables makes options upper variables too, for example
            ``lambda x: SGDUpdate(lr=x["log_lr"].exp())``.
        state: of the update at the start, for example from `from_optimizer`; default ``update.init(lower)``.
        truncation: differentiate through the last K steps only; the steps before make no graph. None, or K >= T,
            goes through all.
        recompute: keep only the iterates and the seeds of their random masks, and rebuild the graph of one step at a
            time on the way back: the memory of one graph instead of K, for one more gradient a step. Same result.
        implicit: as for `linearize`. Other lower variables take part in the steps, but their movement is not
            differentiated.
        started_from: lower name -> upper name that y_0 was copied from (MAML), whose derivative is then included.
        on_failure: what to do about a hypergradient that is not finite (nothing is solved, so there is no `Status`):
            "warn" (`SolverWarning`), "raise" (`SolverError`) or "ignore". The values come back as they are.

    Returns:
        A `Hypergradient` with `solution` None, `lower` y_T, and `stationarity` the norm of dG/dy at y_T on the last
        batch alone (all batches would cost T more gradients). With several ranks gradients are means over them.

    Raises:
        TypeError, ValueError: bad arguments, as for `linearize`; a truncation below 1; `started_from` with names that
            do not fit or with a truncation that leaves steps out.
    """
    _check_levels(upper, lower, lower_batches, on_failure)
    names = implicit_names(problem, lower, implicit)
    depth = _check_truncation(truncation, len(lower_batches))
    pairs = _check_pairs(started_from, upper, lower, names, complete=depth == len(lower_batches))
    trajectory = _Trajectory(problem, upper, update, names)
    kept, final = trajectory.run(lower, state, lower_batches, depth, recompute=recompute)
    return _through(trajectory, upper, kept, final, upper_batch, lower_batches, pairs, on_failure)


def _through(
    trajectory: "_Trajectory",
    upper: Params,
    kept: list["_Step | _Point"],
    final: Params,
    upper_batch: Any,
    lower_batches: Sequence[Any],
    pairs: Mapping[str, str],
    on_failure: OnFailure,
) -> Hypergradient:
    """The hypergradient at the end of the steps, back through those that were kept."""
    problem, names = trajectory.problem, trajectory.names
    loss, direct, v = upper_derivatives(problem, upper, final, names, upper_batch)
    response, start = trajectory.sweep(kept, v)
    for lower_name, upper_name in pairs.items():
        response[upper_name] = response[upper_name] + start[lower_name]
    grad = tree.add(direct, response)
    if not tree.all_finite(grad):
        report_failure(_diagnose(final, v), None, on_failure, stacklevel=4)
    seed = trajectory.seed + len(lower_batches)
    gradient = lower_derivatives(problem, upper, final, names, lower_batches[-1], seed)[1]
    return Hypergradient(grad, direct, response, loss, None, float(tree.norm(gradient)), final)


@dataclass(frozen=True)
class _Point:
    """All that a step is made of."""

    lower: Params
    state: State
    batch: Any
    seed: int


@dataclass(frozen=True)
class _Step:
    """A step with the graphs of its two halves: this rank's gradient, and the update with the mean over the ranks.

    `start` and `end` hold the responding variables and their state, each under its slot and name (see `_carry`).
    """

    lower: Params
    local: Params
    mean: Params
    start: Params
    end: Params


class _Trajectory:
    """The steps, forwards and backwards, as functions of the upper variables."""

    def __init__(
        self, problem: Problem, upper: Params, update: Update | Callable[[Params], Update], names: Sequence[str]
    ) -> None:
        if not isinstance(update, Update) and not callable(update):
            raise TypeError(
                f"update must be an Update or a function of the upper variables that makes one, got "
                f"{type(update).__name__}"
            )
        self.problem, self.update, self.names = problem, update, names
        self.x = tree.as_variables(upper)
        self.seed = int(torch.randint(2**31 - 1, ()))

    def run(
        self, lower: Params, state: State | None, batches: Sequence[Any], depth: int, *, recompute: bool
    ) -> tuple[list[_Step | _Point], Params]:
        """What is needed of the last `depth` steps to go back through them, and the final lower variables."""
        lower = tree.detach(lower)
        with torch.no_grad():
            state = starting_state(self._rule(), lower, state)
        kept: list[_Step | _Point] = []
        for t, batch in enumerate(batches):
            point = _Point(lower, state, batch, self.seed + t)
            if t < len(batches) - depth or recompute:
                lower, state = self._advance(point)
            else:
                step, lower, state = self._record(point)
                kept.append(step)
            if t >= len(batches) - depth and recompute:
                kept.append(point)
        return kept, lower

    def sweep(self, kept: list[_Step | _Point], v: Params) -> tuple[Params, Params]:
        """``(d y_T / d x)' v`` over the upper variables, and ``(d y_T / d y_start)' v``; empties `kept` as it goes."""
        adjoint = _carry(v, {}, self.names)
        response = tree.zeros_like(tree.detach(self.x))
        while kept:
            # No name for the step here: it would keep one graph alive while the next is built.
            adjoint, part = self._pull(self._graph(kept.pop()), adjoint)
            response = tree.add(response, part)
        return response, {name: adjoint[f"/{name}"] for name in self.names}

    def _advance(self, point: _Point) -> tuple[Params, State]:
        """The step without a graph."""
        y = tree.as_variables(point.lower)
        with torch.enable_grad():
            value = lower_value(self.problem, tree.detach(self.x), y, point.batch, point.seed)
        gradient = distributed.mean_over_ranks(tree.gradients(value, y))
        with torch.no_grad():
            return self._rule().step(point.lower, gradient, point.state)

    def _graph(self, item: _Step | _Point) -> _Step:
        return item if isinstance(item, _Step) else self._record(item)[0]

    @torch.enable_grad()
    def _record(self, point: _Point) -> tuple[_Step, Params, State]:
        """The step with its graphs, and where it ends."""
        y = tree.as_variables(point.lower)
        value = lower_value(self.problem, self.x, y, point.batch, point.seed)
        local = tree.gradients(value, y, create_graph=True)
        mean = tree.as_variables(distributed.mean_over_ranks(tree.detach(local)))
        state = {slot: self._as_variables(slot, values) for slot, values in point.state.items()}
        lower, after = self._rule().step(y, mean, state)
        step = _Step(
            lower={name: y[name] for name in self.names},
            local={name: local[name] for name in self.names},
            mean={name: mean[name] for name in self.names},
            start=_carry(y, state, self.names),
            end=_carry(lower, after, self.names),
        )
        return step, tree.detach(lower), {slot: tree.detach(values) for slot, values in after.items()}

    def _pull(self, step: _Step, adjoint: Params) -> tuple[Params, Params]:
        """One step of the adjoint recursion: the adjoint at the step's start, and the step's own part in x."""
        end = {key: leaf for key, leaf in step.end.items() if key in adjoint}
        before, w, direct = tree.pullback(end, adjoint, [step.start, step.mean, self.x])
        y, x = tree.pullback(step.local, w, [step.lower, self.x])
        for name, leaf in distributed.mean_over_ranks(y).items():
            before[f"/{name}"] = before[f"/{name}"] + leaf
        return before, tree.add(direct, distributed.mean_over_ranks(x))

    def _as_variables(self, slot: str, values: Params) -> Params:
        return {n: t.detach().requires_grad_(n in self.names and _differentiable(slot, t)) for n, t in values.items()}

    def _rule(self) -> Update:
        rule = self.update if isinstance(self.update, Update) else self.update(self.x)
        if not isinstance(rule, Update):
            raise TypeError(f"update must make an Update from the upper variables, got {type(rule).__name__}")
        return rule


def _differentiable(slot: str, tensor: torch.Tensor) -> bool:
    return slot != "step" and tensor.is_floating_point()


def _carry(lower: Params, state: State, names: Sequence[str]) -> Params:
    """What one step hands to the next, as one tree: the variables under the empty slot, and their state."""
    flat = {f"/{name}": lower[name] for name in names}
    for slot, values in state.items():
        flat |= {f"{slot}/{n}": t for n, t in values.items() if n in names and _differentiable(slot, t)}
    return flat


def _diagnose(final: Params, v: Params) -> str:
    if not tree.all_finite(final):
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


def _check_levels(upper: Params, lower: Params, lower_batches: Sequence[Any], on_failure: OnFailure) -> None:
    check_on_failure(on_failure)
    tree.check_params("upper", upper)
    tree.check_params("lower", lower)
    check_batches(lower_batches)


def _check_truncation(truncation: int | None, steps: int) -> int:
    """The number of steps to differentiate through."""
    if truncation is None:
        return steps
    if isinstance(truncation, bool) or not isinstance(truncation, int) or truncation < 1:
        raise ValueError(f"truncation must be a whole number of at least 1, or None for all steps, got {truncation!r}")
    return min(truncation, steps)


def _check_pairs(
    started_from: Mapping[str, str] | None, upper: Params, lower: Params, names: Sequence[str], *, complete: bool
) -> dict[str, str]:
    """Lower name -> upper name of the pairs, none where there is no mapping."""
    pairs = dict(started_from or {})
    if pairs and not complete:
        raise ValueError("started_from needs the derivative through all the steps; leave truncation out")
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
