"""Residuals as systems, lower steps and checks evaluate them: randomness and buffers fixed, means over batches."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from bilevel import distributed, tree
from bilevel.lower.kinds.proximal import ProximalProblem, apply_map, check_step_size, map_of
from bilevel.lower.kinds.residual import FixedPointProblem, ResidualProblem
from bilevel.lower.objectives import LowerObjectives, check_scalar
from bilevel.lower.reach import examine_lower
from bilevel.lower.staleness import BufferWatch
from bilevel.lower.surroundings import check_recordable
from bilevel.nn import curvature_pass, own_draws, training_pass
from bilevel.problem import Problem
from bilevel.products import VectorField, reached
from bilevel.tree import Params


def residual_field(problem: ResidualProblem, objectives: LowerObjectives, batch: Any, seed: int) -> VectorField:
    """S on a batch as a function of the upper variables and of some of the lower ones, over these."""

    def field(upper: Params, variables: Params) -> Params:
        check_recordable("residual")
        with curvature_pass(seed, objectives.watch):
            return _evaluated(problem, upper, objectives.everything, variables, batch)

    return field


def training_residual(
    problem: ResidualProblem, upper: Params, lower: Params, batch: Any, *, seed: int | None, write_buffers: bool
) -> tuple[Tensor, Params]:
    """The norm of S and S over all lower variables, averaged over the ranks, by an ordinary pass; arguments as for
    `training_derivatives`."""
    x, y = tree.detach(upper), tree.as_variables(lower)
    with own_draws() if seed is None else training_pass(seed, write_buffers=write_buffers):
        value = tree.detach(_evaluated(problem, x, {}, y, batch))
    value = distributed.mean_over_ranks(value)
    return tree.norm(value), value


def mean_residual(
    problem: ResidualProblem, upper: Params, lower: Params, names: Sequence[str], batches: Sequence[Any]
) -> Params:
    """S over the lower variables `names` for the mean over batches and ranks, writing no buffer."""
    objectives = LowerObjectives(problem, lower, 0, BufferWatch())
    x, y = tree.detach(upper), {name: lower[name].detach() for name in names}
    if not isinstance(problem, ProximalProblem):
        fields = [residual_field(problem, objectives, batch, 0) for batch in batches]
        return _mean([tree.detach(field(x, tree.as_variables(y))) for field in fields])
    step = check_step_size(problem)
    gradients = [smooth_gradient(problem, x, lower, names, batch, 0) for batch in batches]
    return ProximalPoint(problem, x, lower, names, _mean(gradients), step).residual()


def smooth_gradient(
    problem: Problem, upper: Params, lower: Params, names: Sequence[str], batch: Any, seed: int
) -> Params:
    """dG/dy of G = L + lambda r on one batch of this rank, over the lower variables `names`."""
    y = tree.as_variables({name: lower[name] for name in names})
    everything = {**tree.detach(lower), **y}
    with torch.enable_grad(), curvature_pass(seed):
        value = check_scalar("lower_objective", problem.lower_objective(upper, everything, batch))
        penalty = problem.regularizer(upper, everything)
        value = value if penalty is None else value + problem.regularization_weight * penalty
    return tree.gradients(value, y)


class ProximalPoint:
    """prox at z = y - eta dG/dy with its derivatives, by one graph: which piece of the map is active is read from z.

    Args:
        lower: all lower variables; the map sees those that are not among `names` at their values.
        gradient: dG/dy over `names`, the mean over batches and ranks.
    """

    def __init__(
        self,
        problem: ProximalProblem,
        upper: Params,
        lower: Params,
        names: Sequence[str],
        gradient: Params,
        step: float,
    ) -> None:
        self.step, self._point = step, {name: lower[name].detach() for name in names}
        self._x, self._z = tree.as_variables(upper), tree.as_variables(tree.axpy(-step, gradient, self._point))
        everything = {**tree.detach(lower), **self._z}
        with torch.enable_grad():
            moved = apply_map(problem, self._x, everything, step)
            self._image = {name: moved[name] for name in names}
        with torch.no_grad():
            distances = map_of(problem, self._x).distances(tree.detach(everything), step)
            self.distances = {name: part.detach() for name, part in distances.items() if name in names}

    @property
    def reached_upper(self) -> set[str]:
        """Names of the upper variables that the map's parameters depend on."""
        return reached(self._image.values(), self._x)

    def residual(self) -> Params:
        """y - T(x, y)."""
        return tree.sub(self._point, tree.detach(self._image))

    def back(self, vector: Params) -> Params:
        """``J' w`` with J the derivative of the map in z."""
        return tree.pullback(self._image, vector, [self._z], retain_graph=True)[0]

    def back_to_upper(self, vector: Params) -> Params:
        """``(d prox / dx)' w`` at fixed z."""
        return tree.pullback(self._image, vector, [self._x], retain_graph=True)[0]

    def active_set(self) -> Tensor:
        """The signs of the distances from the map's kinks, as one vector of int8 on the CPU; empty for a smooth map."""
        signs = [part.sign().to(torch.int8).reshape(-1).cpu() for part in self.distances.values()]
        return torch.cat(signs) if signs else torch.zeros(0, dtype=torch.int8)

    def margin(self) -> float:
        """The least distance from a kink; infinite for a smooth map."""
        parts = [part.abs().min() for part in self.distances.values() if part.numel()]
        return min(map(float, parts), default=float("inf"))

    def size(self) -> float:
        """The largest entry of z in modulus, which its rounding errors are relative to."""
        return largest_entry(tree.detach(self._z))


def largest_entry(x: Params) -> float:
    """The largest modulus of an entry, 0 where there is none."""
    return max((float(leaf.abs().max()) for leaf in x.values() if leaf.numel()), default=0.0)


def _evaluated(problem: ResidualProblem, upper: Params, everything: Params, variables: Params, batch: Any) -> Params:
    """S over `variables`, after looking at what its map reaches and gives."""
    lower = {**everything, **variables}
    is_map = isinstance(problem, FixedPointProblem)
    name = "fixed_point_map" if is_map else "residual"
    values = problem.fixed_point_map(upper, lower, batch) if is_map else problem.residual(upper, lower, batch)
    _check_values(f"{type(problem).__name__}.{name}", values, variables)
    examine_lower(problem, name, list(values.values()), upper, variables)
    values = {n: values[n] for n in variables}
    return tree.sub(variables, values) if is_map else values


def _check_values(what: str, values: object, like: Params) -> None:
    """Raise unless there is a tensor of its shape for each variable."""
    if not isinstance(values, dict):
        raise TypeError(f"{what} must return a dict with a tensor for each lower variable, got {type(values).__name__}")
    for name, leaf in like.items():
        value = values.get(name)
        if name not in values:
            raise ValueError(f"{what} gave nothing for lower variable {name!r}, but {sorted(values)}")
        if not isinstance(value, Tensor) or value.shape != leaf.shape:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{what} must give lower variable {name!r} a tensor of its shape {tuple(leaf.shape)}, got {shape}; for "
                "an expectation over a batch take the mean over its samples"
            )


def _mean(parts: Sequence[Params]) -> Params:
    return distributed.mean_over_ranks(tree.scale(1.0 / len(parts), reduce(tree.add, parts)))
