"""Does a hypergradient agree with what it claims to be the derivative of?"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch

from bilevel import tree
from bilevel.checks import check_count, check_function, check_kind, check_number, check_variables
from bilevel.hypergradients.differences import derivative, step_ranges
from bilevel.hypergradients.hypergradient import as_method, hypergradient
from bilevel.hypergradients.method import Method
from bilevel.hypergradients.result import Hypergradient
from bilevel.linear import CG, Solver
from bilevel.lower import differentiates
from bilevel.nn import curvature_pass
from bilevel.problem import Problem
from bilevel.tree import Params

LowerSolver = Callable[[Problem, Params, Params, Sequence[Any]], Params]
"""``lower_solver(problem, upper, lower, lower_batches) -> lower``: solves the lower problem from `lower` on."""


@dataclass(frozen=True)
class HypergradientCheck:
    """Outcome of `check_hypergradient`; ``print`` it for the verdict and the numbers behind it.

    Attributes:
        relative_error: ``||a - n|| / ||n||`` over the directions, a the derivatives that the hypergradient predicts and
            n the central differences.
        uncertainty: what is left open by the differences themselves, in the same units.
        agrees: the error is within `tolerance`, and the differences are sharp enough to say so.
        verdict: in words.
        predicted, measured: derivatives along each direction.
        steps: the largest and smallest step that the differences were taken with.
        stationarity: norm of the lower gradient at the re-solved lower variables, with the undamped weight.
        moved: distance from the lower variables given to the re-solved ones, relative to the latter.
        damping: as given; with damping the differences are of the problem whose weight is lambda + damping.
        undamped_error: with damping, `relative_error` against the undamped problem; None otherwise.
        hypergradient: what was checked.
    """

    relative_error: float
    uncertainty: float
    agrees: bool
    verdict: str
    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    steps: tuple[float, float]
    stationarity: float
    moved: float
    damping: float
    undamped_error: float | None
    hypergradient: Hypergradient

    def __str__(self) -> str:
        lines = [self.verdict, "direction  predicted        measured"]
        pairs = zip(self.predicted, self.measured, strict=True)
        lines += [f"{i:9d}  {a:+.8e}  {n:+.8e}" for i, (a, n) in enumerate(pairs, 1)]
        lines.append(f"relative error {self.relative_error:.2e}, uncertainty of the differences {self.uncertainty:.2e}")
        lines.append(
            f"lower stationarity {self.stationarity:.2e}; re-solving moved the lower variables by {self.moved:.2e}"
        )
        if self.undamped_error is not None:
            lines.append(f"error against the undamped problem {self.undamped_error:.2e}")
        return "\n".join(lines)


@differentiates
def check_hypergradient(
    problem: Problem,
    upper: Params,
    lower: Params,
    method: Method | Solver | None = None,
    *,
    upper_batch: Any,
    lower_batches: Sequence[Any],
    lower_solver: LowerSolver,
    gradient: Params | None = None,
    directions: int = 4,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> HypergradientCheck:
    r"""Compare the hypergradient with central differences of :math:`x \mapsto F(x, y^*(x))`, y re-solved at each point.

    The lower problem is solved once at x, the hypergradient taken there, and

    .. math:: \frac{F(x + h u, y^*(x + h u)) - F(x - h u, y^*(x - h u))}{2 h}
       \quad\text{against}\quad \langle g, u\rangle

    along orthonormal directions u. The step is chosen by itself: h starts at a tenth of the size of x (its root mean
    square; 1 where x = 0), shrinks, and the differences are extrapolated (Richardson; Ridders 1982) until an
    estimate, which the next smaller step must confirm, is certain to a hundredth of `tolerance`, or to `tolerance`
    before rounding takes over. Four to six steps do for a function that is smooth on the scale of x; the search ends
    at the square root of the rounding unit, after larger steps up to 0.1 where x is smaller. With a `Method.damping`
    the problem that is re-solved is the one whose regularization weight is ``lambda + damping``, which is what the
    damped system differentiates; the distance to the undamped problem is reported beside it.

    Args:
        lower: where `lower_solver` starts from.
        method: default ``Implicit(CG(200, 1e-10))``; give the one that is used in training to check that. What a
            method leaves out (Tikhonov's term, steps before a truncation) counts as an error.
        lower_solver: solves the lower problem to high accuracy; it gets the problem (damped where that is asked for),
            the upper variables, the lower start and the batches, and returns the lower variables. Objectives must be
            deterministic; batch statistics are fine and no buffer is written.
        gradient: check this in place of the hypergradient, for one that was computed elsewhere at the re-solved y.
        directions: number of directions; all coordinates where there are no more than that.
        tolerance: largest relative error that passes.
        seed: of the directions.

    Raises:
        TypeError: a `lower_solver` that cannot be called, or as for `hypergradient`.
        ValueError: directions < 1, a tolerance that is not positive, or as for `hypergradient`.
    """
    check_kind("problem", problem, Problem, "an instance of a Problem")
    tree.check_params("upper", upper)
    check_variables("lower", lower)
    check_function("lower_solver", lower_solver, "a function of the problem, upper, lower and the lower batches")
    check_count("directions", directions, least=1)
    check_number("tolerance", tolerance, positive=True)
    point, method = tree.detach(upper), as_method(CG(200, 1e-10) if method is None else method)
    damping = method.damping
    solved_problem = problem if damping == 0.0 else _reweighted(problem, problem.regularization_weight + damping)
    resolved = _Resolved(solved_problem, lower_solver, tree.detach(lower), upper_batch, lower_batches, tolerance)
    start = resolved.solve(point)
    result = hypergradient(
        problem, point, start, method, upper_batch=upper_batch, lower_batches=lower_batches, on_failure="ignore"
    )
    resolved, axes = replace(resolved, start=start), _orthonormal(point, directions, seed)
    undamped = None if damping == 0.0 else replace(resolved, problem=problem)
    return _compare(result, gradient, point, axes, resolved, undamped, lower, tolerance=tolerance, damping=damping)


@dataclass(frozen=True)
class _Resolved:
    """F(x, y*(x)) as a function of x, y solved for from `start` at every x."""

    problem: Problem
    lower_solver: LowerSolver
    start: Params
    upper_batch: Any
    lower_batches: Sequence[Any]
    tolerance: float

    def solve(self, upper: Params) -> Params:
        with torch.enable_grad(), curvature_pass():
            solved = self.lower_solver(self.problem, upper, self.start, self.lower_batches)
        tree.check_params("lower_solver's result", solved)
        return tree.detach(solved)

    def value(self, upper: Params) -> float:
        lower = self.solve(upper)
        with torch.no_grad(), curvature_pass():
            return float(self.problem.upper_objective(upper, lower, self.upper_batch))

    def differences(self, point: Params, axes: Sequence[Params]) -> tuple[list[float], float, tuple[float, float]]:
        """Derivatives along the axes, how uncertain they are together, and the largest and smallest step."""
        ranges = step_ranges(point)
        functions = [cache(partial(self._along, point, u)) for u in axes]
        alone = [derivative(function, ranges, self.tolerance, scale=0.0) for function in functions]
        # Once more from the same values: what is small beside the other directions need not be known as sharply.
        scale = max(abs(e.value) for e in alone)
        found = [derivative(function, ranges, self.tolerance, scale=scale) for function in functions]
        doubt = math.hypot(*(e.doubt for e in found))
        return [e.value for e in found], doubt, (max(e.steps[0] for e in found), min(e.steps[1] for e in found))

    def _along(self, point: Params, direction: Params, step: float) -> float:
        return self.value(tree.axpy(step, direction, point))


def _compare(
    result: Hypergradient,
    gradient: Params | None,
    point: Params,
    axes: Sequence[Params],
    resolved: _Resolved,
    undamped: _Resolved | None,
    lower: Params,
    *,
    tolerance: float,
    damping: float,
) -> HypergradientCheck:
    """`result`, or a `gradient` in its place, against the differences of the damped and of the undamped problem.

    `lower` is where the user let the lower level start.
    """
    grad = result.grad if gradient is None else gradient
    predicted = [float(tree.dot(grad, u)) for u in axes]
    measured, doubt, steps = resolved.differences(point, axes)
    error, uncertainty = _relative(predicted, measured), doubt / max(math.hypot(*measured), 1e-300)
    size = max(float(tree.norm(resolved.start)), 1e-300)
    return HypergradientCheck(
        relative_error=error,
        uncertainty=uncertainty,
        agrees=error <= tolerance and uncertainty <= tolerance,
        verdict=_verdict(error, uncertainty, tolerance, damping, _reasons(predicted, axes, result, gradient is None)),
        predicted=tuple(predicted),
        measured=tuple(measured),
        steps=steps,
        stationarity=result.stationarity,
        moved=float(tree.norm(tree.sub(resolved.start, tree.detach(lower)))) / size,
        damping=damping,
        undamped_error=None if undamped is None else _relative(predicted, undamped.differences(point, axes)[0]),
        hypergradient=result,
    )


def _reweighted(problem: Problem, weight: float) -> Problem:
    """A shallow copy with another regularization weight, whether that is an attribute, a field or a property."""
    twin, kind = copy.copy(problem), type(problem)
    body = {"regularization_weight": property(lambda self: weight), "__module__": kind.__module__}
    # By way of object, for a frozen dataclass.
    object.__setattr__(twin, "__class__", type(kind.__name__, (kind,), body))
    return twin


def _orthonormal(like: Params, count: int, seed: int) -> list[Params]:
    """Orthonormal directions over the tree: coordinates where they are few, random ones otherwise."""
    n = tree.size(like)
    if n == 0:
        raise ValueError("upper holds no numbers; there is nothing to differentiate with respect to")
    if n <= count:
        columns = torch.eye(n, dtype=torch.float64)
    else:
        generator = torch.Generator().manual_seed(seed)
        columns = torch.linalg.qr(torch.randn(n, count, generator=generator, dtype=torch.float64))[0]
    flat = tree.flatten(like)
    return [tree.unflatten(column.to(flat), like) for column in columns.T]


def _relative(predicted: Sequence[float], measured: Sequence[float]) -> float:
    difference = math.hypot(*(a - n for a, n in zip(predicted, measured, strict=True)))
    scale = max(math.hypot(*measured), 1e-12 * math.hypot(*predicted))
    return difference / scale if scale > 0.0 else 0.0


def _verdict(error: float, uncertainty: float, tolerance: float, damping: float, reasons: Sequence[str]) -> str:
    which = f"the damped problem (weight lambda + {damping:g})" if damping else "the re-solved problem"
    if not math.isfinite(error):
        return f"not finite: the hypergradient or {which} gave NaN or infinity"
    if uncertainty > max(tolerance, 0.1 * min(error, 1.0)):
        return (
            f"undecided: the differences of {which} are uncertain by {uncertainty:.1e}, and the hypergradient is "
            f"{error:.1e} away; solve the lower level more accurately, check in float64, or at other upper variables "
            "if these are at a kink"
        )
    if error <= tolerance:
        return f"right: agrees with central differences of {which} to {error:.1e}"
    return "; ".join([f"wrong: differs from central differences of {which} by {error:.1e}", *reasons])


def _reasons(predicted: Sequence[float], axes: Sequence[Params], result: Hypergradient, own: bool) -> list[str]:
    """Likely causes of a wrong hypergradient: what the solve says, or which known mistake gives the same numbers."""
    solution = result.solution
    if own:
        if solution is not None and not solution.status.ok:
            return [f"the solve ended {solution.status.name}"]
        if solution is None:
            return ["nothing was solved: the method approximates; compare its own assumptions (steps, rates, penalty)"]
        if solution.num_hvps == 0:
            return ["the solver makes no product, which takes A for the identity"]
        return ["the solve did what was asked: look at its residual, at tikhonov, and at `implicit`"]
    mistakes = {
        "the direct part is missing": result.implicit,
        "the implicit part is missing": result.direct,
        "the implicit part has the wrong sign": tree.sub(result.direct, result.implicit),
    }
    reasons = []
    for name, wrong in mistakes.items():
        if _relative(predicted, [float(tree.dot(wrong, u)) for u in axes]) < 1e-3:
            reasons.append(f"as if {name}")
    return reasons
