"""A hypergradient, what is known about it, and what is done where it cannot be trusted."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from bilevel import distributed, tree
from bilevel.checks import warn_outside
from bilevel.linear import Escalating, LinearOperator, Neumann, Solution, Solver, Status, spectrum_bounds
from bilevel.lower import PerProblem, Tikhonov, are_samples
from bilevel.problem import Problem
from bilevel.tree import Params

OnFailure = Literal["warn", "raise", "ignore"]
"""What to do about a hypergradient that has a `Hypergradient.failure`."""

_BREAKDOWNS = (Status.NEGATIVE_CURVATURE, Status.DIVERGED, Status.INCONSISTENT)
# Of the largest eigenvalue: up to where A counts as singular, and the least that is then added to it. Of a negative
# smallest one: what is added.
_SINGULAR, _LEAST_TERM, _MARGIN = 1e-3, 1e-2, 1.5
Bounds = tuple[float, float]
_of_problem = PerProblem[dict[str, Bounds]](dict)
_of_type = WeakKeyDictionary[type[Problem], dict[str, Bounds]]()

# A bias of about a quarter; a digit below it; a gradient that the choice of batches explains.
_LARGE_NOISE, _FAR_BELOW, _UNSOLVED = 0.5, 0.1, 1 / 3
_examined = PerProblem[set[str]](set)


class SolverWarning(UserWarning):
    """A hypergradient is not what was asked for; where a solve failed, the message carries its `Status`."""


class SolverError(RuntimeError):
    """As `SolverWarning`, where ``on_failure="raise"``; `solution` holds what the solver had, None without a solve."""

    def __init__(self, message: str, solution: Solution | None) -> None:
        super().__init__(message)
        self.solution = solution


@dataclass(frozen=True)
class Hypergradient:
    """dF(x, y*(x))/dx and what is known about it.

    Attributes:
        grad: ``direct + implicit``, over the upper variables.
        direct: dF/dx at fixed y.
        implicit: the response of y; ``-(cross term) x`` with A x = dF/dy where a system is solved.
        loss: F, 0-d and detached.
        solution: of the linear system, None where nothing is solved.
        stationarity: norm of the lower gradient dG/dy over the implicit variables; of a lower level that is no smooth
            minimum, of its residual: y - T(x, y) or S(x, y). The implicit function theorem assumes that it is 0.
        noise: standard error of the lower gradient over the lower batches, in the units of `stationarity`; None for a
            single batch.
        lower: the lower variables after the steps of a method that makes some, None where none is made.
        failure: in words what went wrong, None where nothing did: curvature that an operation of the lower objective
            loses, a solve whose status is not a success, a part that is not finite; for a `ResidualProblem` also a y
            that is no solution (the residual is above a hundredth of ||y||, what its batches explain and the square
            root of the rounding unit), and a point so near a kink of a proximal map that its active set is not known.
        warning: in words that the solve is more accurate than the lower batches can tell, or that they cannot tell its
            solution from zero (`Status.LOST_IN_THE_NOISE`), each once for a problem; None otherwise. `Solution.noise`
            is the measure, None for a single batch: it was not measured there.
        active_set: of a `ProximalProblem`, the signs of the distances from the kinks of its map (`ProximalMap`), int8;
            None for other kinds.
        active_changes: how many of these signs are others than in the training's upper step before; None outside of a
            `Trainer`, in its first upper step and for other kinds.
    """

    grad: Params
    direct: Params
    implicit: Params
    loss: Tensor
    solution: Solution | None
    stationarity: float
    lower: Params | None = None
    noise: float | None = None
    failure: str | None = None
    warning: str | None = None
    active_set: Tensor | None = None
    active_changes: int | None = None

    @property
    def stationarity_over_noise(self) -> float | None:
        """`stationarity` as a multiple of `noise`: up to a few times 1, the batches cannot tell it from 0.

        None where there is no noise to compare with; infinite where batches agree on a gradient that is not 0.
        """
        if self.noise is None:
            return None
        if self.noise == 0.0:
            return math.inf * self.stationarity if self.stationarity != 0.0 else 0.0
        return self.stationarity / self.noise


@dataclass(frozen=True)
class AdjointSolve:
    """What is known about one solve of A x = v, v = dF/dy, and the point that it was made at.

    Attributes:
        solution, stationarity, noise, failure, warning, active_set: as of a `Hypergradient`.
    """

    solution: Solution
    stationarity: float
    noise: float | None = None
    failure: str | None = None
    warning: str | None = None
    active_set: Tensor | None = None


class SolvedSystem(Protocol):
    """Of a `System`, what tells why a solve went wrong and what would help."""

    problem: Problem
    solver: Solver
    operator: LinearOperator
    tikhonov: Tikhonov
    damping: float
    has_regularizer: bool
    lower_batches: tuple[object, ...]

    def batch_sums(self) -> tuple[str, ...]: ...
    def standard_errors(self, x: Params) -> tuple[float, float] | None: ...


def solve_failure(system: SolvedSystem, solution: Solution, b: Params, on_failure: OnFailure) -> str | None:
    """What the status of the solve for b says where it is not a success, and where that is to be shown what would help
    this system."""
    if solution.status.ok:
        return None
    residual = solution.residual_norms[1]
    measured = "residual not measured" if math.isnan(residual) else f"relative residual {residual:.2e}"
    broke_down = solution.status in _BREAKDOWNS and on_failure != "ignore"
    remedy = _remedy(system, solution, b, on_failure) if broke_down else None
    text = f"{solution.status.value} ({measured} after {solution.iterations} iterations)"
    return text if remedy is None else f"{text}; here {remedy}"


def _bounds(system: SolvedSystem, solution: Solution, b: Params, on_failure: OnFailure) -> Bounds | None:
    """Of the spectrum of A, by a few Lanczos steps. They are made once for a problem, its variables and what is added
    to A, and where one only warns, once for all problems of the type; and anew where the solve has met more."""
    shared = on_failure == "warn"
    known = _of_type.setdefault(type(system.problem), {}) if shared else _of_problem.of(system.problem)
    settings = repr((system.tikhonov, system.damping, [(name, tuple(leaf.shape)) for name, leaf in b.items()]))
    kept, met = known.get(settings), _met(solution)
    if (
        kept is not None
        and met[0] + needed_tikhonov(kept) >= _SINGULAR * _size(kept)
        and met[1] <= _MARGIN * _size(kept)
    ):
        return kept
    with torch.no_grad():
        found = spectrum_bounds(system.operator, b)
    if found is None:
        return None
    known[settings] = min(found[0], met[0]), max(found[1], met[1])
    return known[settings]


def _met(solution: Solution) -> Bounds:
    """The least and the largest curvature that a solve has met; infinite the wrong way where it has met none."""
    values = [value for value in (*(solution.ritz_range or ()), solution.min_curvature) if value is not None]
    values = [value for value in values if math.isfinite(value)]
    return min(values, default=math.inf), max(values, default=-math.inf)


def _size(bounds: Bounds) -> float:
    return max(-bounds[0], bounds[1])


def needed_tikhonov(bounds: Bounds) -> float:
    """What to add to A, whose eigenvalues lie within these bounds, for it to be positive definite."""
    if bounds[0] > _SINGULAR * _size(bounds):
        return 0.0
    return max(-_MARGIN * bounds[0], _LEAST_TERM * _size(bounds)) or 1.0


def _remedy(system: SolvedSystem, solution: Solution, b: Params, on_failure: OnFailure) -> str | None:
    """What would make A positive definite, and a given scale of Neumann's small enough."""
    if not system.operator.symmetric:
        return None
    bounds = _bounds(system, solution, b, on_failure)
    if bounds is None:
        return None
    more, high = needed_tikhonov(bounds), bounds[1]
    advice, term = [], system.tikhonov
    if more > 0.0:
        add = f"add about {_rounded(more):g} to tikhonov of every implicit variable"
        damp = ", or raise damping where the regularizer is strictly convex" if system.has_regularizer else ""
        up = add if isinstance(term, Mapping) else f"raise tikhonov from {term:g} to about {_rounded(term + more):g}"
        advice.append(up + damp)
    solver = system.solver.solver if isinstance(system.solver, Escalating) else system.solver
    if isinstance(solver, Neumann) and not isinstance(solver.scale, str) and solver.scale * (high + more) >= 2.0:
        advice.append(f"give Neumann a scale of at most {1.0 / (high + more):.2g}")
    return " and ".join(advice) or None


def _rounded(value: float) -> float:
    """Up to two digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.2g}")


def noise_warning(system: SolvedSystem, solution: Solution, b: Params, stationarity: float) -> str | None:
    """That the solve is lost in the noise or went far below a large noise of A x, and what to do about it; each once
    for a problem, else None.

    The second takes a product, and only where the lower batches may be samples: others have come with this problem, and
    y is no solution of these alone (its gradient is not small beside its own noise). A single batch is halved once.
    """
    samples, done = are_samples(system.problem, system.batch_sums), _examined.of(system.problem)
    if solution.status is Status.LOST_IN_THE_NOISE:
        first = "lost" not in done
        done.add("lost")
        return solution.status.value if first else None
    reached = solution.residual_norms[1]
    accurate = solution.status.ok and solution.status is not Status.AT_THE_NOISE and math.isfinite(reached)
    if not samples or not accurate or "said" in done or distributed.world_size() > 1:
        return None
    single = len(system.lower_batches) == 1
    if "halved" in done if single else not _is_large(solution.noise, reached):
        return None
    done.add("halved" if single else "screened")
    with torch.no_grad():
        errors, size = system.standard_errors(solution.value), float(tree.norm(b))
    if (
        errors is None
        or size == 0.0
        or stationarity < _UNSOLVED * errors[1]
        or not _is_large(errors[0] / size, reached)
    ):
        return None
    done.add("said")
    return (
        f"the solve went to a relative residual of {reached:.1e}, but another choice of lower batches would change A x "
        f"by {errors[0] / size:.2g} of the right-hand side: if these batches are samples of one data set, a solve so "
        "accurate is biased in the mean, by about the square of that, since a mean of inverses is not the inverse of "
        'the mean; then take more Hessian batches, a looser rtol (CG has rtol="noise"), or raise tikhonov. If each '
        "is the whole of a task of its own, there is no such bias"
    )


def _is_large(noise: float | None, reached: float) -> bool:
    """Whether the noise is large, and the residual far below it."""
    return noise is not None and noise >= _LARGE_NOISE and reached <= _FAR_BELOW * noise


def joined(*failures: str | None) -> str | None:
    """Several failures in one, None where there is none."""
    return "; ".join(failure for failure in failures if failure is not None) or None


def finite_failure(direct: Params, implicit: Params) -> str:
    """Which part of a hypergradient that is not finite though its solve succeeded is not, and what to check."""
    causes = []
    if not tree.all_finite(direct):
        causes.append("the direct part dF/dx is not finite; check how upper_objective depends on the upper variables")
    if not tree.all_finite(implicit):
        causes.append(
            "the cross term (d2G/dxdy) x is not finite; check how lower_objective and regularizer depend on the upper "
            "variables"
        )
    cause = "; ".join(causes) or "the direct part and the cross term are finite but their sum is not"
    return f"non-finite: {cause} (square roots, norms and logarithms have no finite derivative at 0)"


def check_on_failure(on_failure: object) -> None:
    """Raise ValueError for a word that is not one of the three."""
    if on_failure not in get_args(OnFailure):
        raise ValueError(f"on_failure must be one of {get_args(OnFailure)}, got {on_failure!r}")


def report_failure(result: Hypergradient | AdjointSolve, on_failure: OnFailure) -> None:
    """The one place where a failure is acted upon; a warning points to the first line outside this package."""
    if on_failure == "ignore":
        return
    if result.warning is not None:
        warn_outside(result.warning, SolverWarning)
    if result.failure is not None and on_failure == "raise":
        raise SolverError(result.failure, result.solution)
    if result.failure is not None:
        warn_outside(result.failure, SolverWarning)
