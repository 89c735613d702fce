"""A hypergradient, what is known about it, and what is done where it cannot be trusted."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from bilevel import tree
from bilevel.checks import warn_outside
from bilevel.linear import Solution
from bilevel.tree import Params

OnFailure = Literal["warn", "raise", "ignore"]
"""What to do about a hypergradient that has a `Hypergradient.failure`."""


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
        stationarity: norm of the lower gradient dG/dy over the implicit variables. The implicit function theorem
            assumes that it is 0.
        noise: standard error of the lower gradient over the lower batches, in the units of `stationarity`; None for a
            single batch.
        lower: the lower variables after the steps of a method that makes some, None where none is made.
        failure: in words what went wrong, None where nothing did: curvature that an operation of the lower objective
            loses, a solve whose status is not a success, a part that is not finite.
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


def solve_failure(solution: Solution) -> str | None:
    """What a solve's status says where it is not a success."""
    if solution.status.ok:
        return None
    residual = solution.residual_norms[1]
    measured = "residual not measured" if math.isnan(residual) else f"relative residual {residual:.2e}"
    return f"{solution.status.value} ({measured} after {solution.iterations} iterations)"


def joined(*failures: str | None) -> str | None:
    """Several failures in one, None where there is none."""
    return "; ".join(failure for failure in failures if failure is not None) or None


def finite_failure(direct: Params, implicit: Params, grad: Params) -> str | None:
    """Which part of a hypergradient is not finite though its solve succeeded, and what to check."""
    if tree.all_finite(grad):
        return None
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


def report_failure(result: Hypergradient, on_failure: OnFailure) -> None:
    """The one place where a failure is acted upon; a warning points to the first line outside this package."""
    if result.failure is None or on_failure == "ignore":
        return
    if on_failure == "raise":
        raise SolverError(result.failure, result.solution)
    warn_outside(result.failure, SolverWarning)
