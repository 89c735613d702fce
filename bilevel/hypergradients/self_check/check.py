"""Does a hypergradient agree with what it claims to be the derivative of?"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import zip_longest
from typing import Any

import torch

from bilevel import tree
from bilevel.checks import check_count, check_function, check_kind, check_number, check_variables
from bilevel.hypergradients.hypergradient import as_method, hypergradient
from bilevel.hypergradients.implicit import Implicit
from bilevel.hypergradients.method import Method, check_serves, check_stands_alone
from bilevel.hypergradients.result import Hypergradient
from bilevel.hypergradients.self_check.differences import Estimate, derivative, step_ranges
from bilevel.linear import CG, GMRES, Identity, Solver
from bilevel.lower import (
    Examination,
    LowerSolver,
    OutOfTime,
    ResidualProblem,
    Resolved,
    Solves,
    check_batch,
    check_batches,
    differentiates,
    explaining_batches,
    reweighted,
    thorough_examinations,
)
from bilevel.problem import Problem
from bilevel.tree import Params

_TYPICAL = math.e**2
"""The largest step over one of those that differences end with."""
_TOO_FAR = 10.0
"""A solver that leaves this many times the tolerance is not worth the differences."""


@dataclass(frozen=True)
class HypergradientCheck:
    """Outcome of `check_hypergradient`; ``print`` it for the verdict and the numbers behind it.

    Attributes:
        relative_error: ``||a - n|| / ||n||`` over the directions, a the derivatives that the hypergradient predicts and
            n the central differences; NaN where none were made.
        uncertainty: what is left open by the differences themselves, and by what the lower solver leaves, in the same
            units.
        agrees: the error is within `tolerance`, and the differences are sharp enough to say so.
        verdict: in words.
        predicted, measured: derivatives along each direction; fewer, or none, are measured where the check ended early.
        steps: the largest and smallest step that the differences were taken with.
        stationarity: norm of the lower gradient at the re-solved lower variables, with the undamped weight; of the
            residual where the lower level is no smooth minimum.
        moved: distance from the lower variables given to the re-solved ones, relative to the latter.
        damping: as given; with damping the differences are of the problem whose weight is lambda + damping.
        undamped_error: with damping, `relative_error` against the undamped problem; None otherwise.
        solves: how often the lower problem was solved.
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
    solves: int
    hypergradient: Hypergradient

    def __str__(self) -> str:
        lines = [self.verdict, "direction  predicted        measured"]
        pairs = zip_longest(self.predicted, self.measured)
        lines += [f"{i:9d}  {a:+.8e}  {'-' if n is None else f'{n:+.8e}'}" for i, (a, n) in enumerate(pairs, 1)]
        lines.append(f"relative error {self.relative_error:.2e}, uncertainty of the differences {self.uncertainty:.2e}")
        lines.append(
            f"lower stationarity {self.stationarity:.2e}; re-solving moved the lower variables by {self.moved:.2e}; "
            f"{self.solves} {'solve' if self.solves == 1 else 'solves'}"
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
    seconds: float | None = None,
    progress: Callable[[str], None] | None = None,
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

    Before that, the lower problem is solved at x + h u and once more from there. Where F still moves, or would by the
    lower gradient that is left and the solution of the linear system, by so much that the differences would measure the
    solver, the verdict says so at once and no differences are made. The verdict also names curvature that an operation
    of the lower objective loses (`Problem.check_curvature`), which is looked for here in problems of any size.

    Args:
        lower: where `lower_solver` starts from.
        method: default ``Implicit(CG(200, 1e-10))``, ``Implicit(GMRES(200, rtol=1e-10))`` for a
            `bilevel.lower.ResidualProblem`; give the one that is used in training to check that. What a
            method leaves out (Tikhonov's term, steps before a truncation) counts as an error.
        lower_solver: solves the lower problem to high accuracy, by gradient steps, by iterating a fixed-point map
            (`bilevel.lower.ProximalProblem.fixed_point_map`), by a root finder, in closed form; it gets the problem
            (damped where that is asked for), the upper variables, the lower start and the batches, and returns the
            lower variables. Objectives must be deterministic; batch statistics are fine and no buffer is written.
        gradient: check this in place of the hypergradient, for one that was computed elsewhere at the re-solved y.
        directions: number of directions; all coordinates where there are no more than that.
        tolerance: largest relative error that passes.
        seed: of the directions.
        seconds: a budget. No solve begins after it, and the verdict is of what is known by then.
        progress: is given a line after every solve; ``print`` shows them.

    Raises:
        TypeError: a `lower_solver` or `progress` that cannot be called, or as for `hypergradient`.
        ValueError: directions < 1, a tolerance or seconds that are not positive, or as for `hypergradient`.
    """
    check_kind("problem", problem, Problem, "an instance of a Problem")
    tree.check_params("upper", upper)
    check_variables("lower", lower)
    check_batches(lower_batches)
    check_batch("upper_batch", [upper_batch])
    check_function("lower_solver", lower_solver, "a function of the problem, upper, lower and the lower batches")
    check_count("directions", directions, least=1)
    check_number("tolerance", tolerance, positive=True)
    if seconds is not None:
        check_number("seconds", seconds, positive=True)
    if progress is not None:
        check_function("progress", progress, "a function of a line, such as print")
    if method is None:
        method = GMRES(200, rtol=1e-10) if isinstance(problem, ResidualProblem) else CG(200, 1e-10)
    point, method = tree.detach(upper), as_method(method)
    check_serves(method, problem)
    check_stands_alone(method)
    damping = method.damping
    solved_problem = problem if damping == 0.0 else reweighted(problem, problem.regularization_weight + damping)
    solves = Solves(seconds, progress)
    resolved = Resolved(solved_problem, lower_solver, tree.detach(lower), upper_batch, lower_batches, solves, "at x")
    with explaining_batches(lower_batches):
        start = resolved.solve(point)
    with thorough_examinations() as examinations:
        result = hypergradient(
            problem, point, start, method, upper_batch=upper_batch, lower_batches=lower_batches, on_failure="ignore"
        )
    resolved, axes = replace(resolved, start=start, where=""), _orthonormal(point, directions, seed)
    undamped = None if damping == 0.0 else replace(resolved, problem=problem)
    grad = result.grad if gradient is None else gradient
    predicted = [float(tree.dot(grad, u)) for u in axes]
    found = _measure(resolved, undamped, point, axes, predicted, result, tolerance)
    reasons = _reasons(predicted, axes, result, method if gradient is None else None)
    size = max(float(tree.norm(start)), 1e-300)
    return HypergradientCheck(
        relative_error=found.error,
        uncertainty=found.uncertainty,
        agrees=found.complete and found.error <= tolerance and found.uncertainty <= tolerance,
        verdict="; ".join([_verdict(found, result, tolerance, damping, reasons, solves), *_curvature(examinations)]),
        predicted=tuple(predicted),
        measured=tuple(found.measured),
        steps=found.steps,
        stationarity=result.stationarity,
        moved=float(tree.norm(tree.sub(start, tree.detach(lower)))) / size,
        damping=damping,
        undamped_error=found.undamped_error,
        solves=solves.count,
        hypergradient=result,
    )


@dataclass(frozen=True)
class _Found:
    """What the differences say, of as many directions as there was time for."""

    measured: Sequence[float] = ()
    error: float = math.nan
    uncertainty: float = math.nan
    open_share: float = 0.0
    steps: tuple[float, float] = (math.nan, math.nan)
    undamped_error: float | None = None
    complete: bool = False


def _measure(
    resolved: Resolved,
    undamped: Resolved | None,
    point: Params,
    axes: Sequence[Params],
    predicted: Sequence[float],
    result: Hypergradient,
    tolerance: float,
) -> _Found:
    """The derivatives along the axes, unless the solver is too far from a solution for them."""
    solution, step = result.solution, step_ranges(point)[0][0] / _TYPICAL
    trusted = solution is not None and solution.num_hvps > 0 and solution.status.ok
    # Along all axes at once, which sees of each its share by the root of their number.
    every = tree.scale(len(axes) ** -0.5, reduce(tree.add, axes))
    beside = tree.axpy(step, every, point)
    try:
        value, left = resolved.left_by_the_solver(beside, solution.value if trusted and solution else None)
    except OutOfTime:
        return _Found()
    slope, left = (
        len(axes) ** 0.5 * size / step for size in (abs(value - resolved.value(point, resolved.start)), left)
    )
    open_share = left / max(slope, math.hypot(*predicted), 1e-300)
    if open_share > _TOO_FAR * tolerance:
        return _Found(uncertainty=open_share, open_share=open_share, steps=(step, step))
    estimates = _differences(resolved, point, axes, tolerance)
    if not estimates:
        return _Found()
    measured = [estimate.value for estimate in estimates]
    size = max(math.hypot(*measured), 1e-300)
    complete, undamped_error = len(estimates) == len(axes), None
    if undamped is not None and complete:
        others = _differences(replace(undamped, where="undamped "), point, axes, tolerance)
        complete = len(others) == len(axes)
        undamped_error = _relative(predicted, [e.value for e in others]) if complete else None
    return _Found(
        measured=measured,
        error=_relative(predicted[: len(measured)], measured),
        uncertainty=math.hypot(*(e.doubt for e in estimates), left) / size,
        open_share=open_share,
        steps=(max(e.steps[0] for e in estimates), min(e.steps[1] for e in estimates)),
        undamped_error=undamped_error,
        complete=complete,
    )


def _differences(resolved: Resolved, point: Params, axes: Sequence[Params], tolerance: float) -> list[Estimate]:
    """Derivatives along the axes, along the first ones where the time does not suffice for all."""
    ranges, count = step_ranges(point), len(axes)
    functions = [
        resolved.along(point, u, f"{resolved.where}direction {i} of {count}") for i, u in enumerate(axes, start=1)
    ]
    found: list[Estimate] = []
    try:
        for function in functions:
            found.append(derivative(function, ranges, tolerance, scale=0.0))
        # Once more from the same values: what is small beside the other directions need not be known as sharply.
        scale = max(abs(e.value) for e in found)
        return [derivative(function, ranges, tolerance, scale=scale) for function in functions]
    except OutOfTime:
        return found


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


def _verdict(
    found: _Found, result: Hypergradient, tolerance: float, damping: float, reasons: Sequence[str], solves: Solves
) -> str:
    which = f"the damped problem (weight lambda + {damping:g})" if damping else "the re-solved problem"
    if found.open_share > _TOO_FAR * tolerance:
        return (
            f"not solved: the lower solver does not reach stationarity ({result.stationarity:.1e} at x; "
            f"beside x a solve leaves {found.open_share:.1e} of F's derivative open, and the tolerance is "
            f"{tolerance:.1e}): the differences would measure the solver, not the hypergradient; solve the lower level "
            "more accurately, or pass a larger tolerance"
        )
    if not found.complete:
        known = len(found.measured)
        so_far = f"so far, along {known} directions, it differs by {found.error:.1e}; " if known else ""
        return (
            f"unfinished: the budget of {solves.seconds:g} seconds was spent after {solves}; {so_far}give more "
            "seconds, fewer directions or a faster lower solver"
        )
    error, uncertainty = found.error, found.uncertainty
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


def _curvature(examinations: Sequence[Examination]) -> list[str]:
    """What was found out about the curvature, where something is lost or nothing is known."""
    lost = [text for examination in examinations if (text := examination.lost())]
    doubts = [e.doubt for e in examinations if e.doubt]
    undecided = [f"whether curvature is lost is undecided ({doubts[0]})"] if doubts and not lost else []
    return lost[:1] or undecided


def _without_products(method: Method) -> str:
    """What stands for the inverse where no product with A is made."""
    if isinstance(method, Implicit) and isinstance(method.solver, Identity):
        return "the solver makes no product, which takes A for the identity"
    name = type(method.solver if isinstance(method, Implicit) else method).__name__
    return f"{name} solves no system, and what it puts in place of the inverse of A is an approximation"


def _reasons(
    predicted: Sequence[float], axes: Sequence[Params], result: Hypergradient, own: Method | None
) -> list[str]:
    """Likely causes of a wrong hypergradient: what the solve of the method `own` says, or for one that came from
    elsewhere (None) which known mistake gives the same numbers."""
    solution = result.solution
    if own is not None:
        if solution is not None and not solution.status.ok:
            return [f"the solve ended {solution.status.name}"]
        if solution is None:
            return ["nothing was solved: the method approximates; compare its own assumptions (steps, rates, penalty)"]
        if solution.num_hvps == 0:
            return [_without_products(own)]
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
