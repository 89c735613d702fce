"""The hypergradient by the implicit function theorem."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from bilevel import tree
from bilevel.hypergradients.system import Implicit, System, Tikhonov, implicit_matches, linearize
from bilevel.linear import Solution, Solver
from bilevel.lower import upper_derivatives
from bilevel.problem import Problem
from bilevel.products import HVP, Automatic
from bilevel.tree import Params

OnFailure = Literal["warn", "raise", "ignore"]


class SolverWarning(UserWarning):
    """A solve did not do what was asked of it; the message carries its `Status`."""


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
        lower: the lower variables after the steps of a function that makes some, None where none is made.
    """

    grad: Params
    direct: Params
    implicit: Params
    loss: Tensor
    solution: Solution | None
    stationarity: float
    lower: Params | None = None
    noise: float | None = None

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


def hypergradient(
    problem: Problem,
    upper: Params,
    lower: Params,
    *,
    upper_batch: Any,
    lower_batches: Sequence[Any] | None = None,
    solver: Solver | None = None,
    hvp: HVP | None = None,
    damping: float | None = None,
    tikhonov: Tikhonov | None = None,
    implicit: Implicit | None = None,
    system: System | None = None,
    x0: Params | None = None,
    on_failure: OnFailure = "warn",
) -> Hypergradient:
    r"""Hypergradient of F(x, y*(x)) at a lower solution y:

    .. math:: \frac{dF}{dx} = \frac{\partial F}{\partial x}
       - \frac{\partial^2 G}{\partial x \partial y} A^{-1} \frac{\partial F}{\partial y}

    with A and the cross term as `linearize` defines them (BiSSL eq. 6-7; Lorraine et al. 2020). Nothing is written:
    no variable, no ``.grad``, no buffer of a module that is bound by `functional_call`.

    Args:
        upper, lower: variables x and y.
        upper_batch: the batch of F.
        lower_batches: sequence of batches, the lower objective being their mean. Not needed with `system`.
        solver, hvp, damping, tikhonov, implicit: as for `linearize` (defaults ``CG()``, ``ReverseOverReverse()``, 0, 0,
            the Problem's). With `system` they may be left out; giving another value than the system's raises.
        system: the result of `linearize`, reused; it must still be fresh.
        x0: first iterate of the solve, for example a former ``solution.value``.
        on_failure: what to do when the solve's status is not a success, or the hypergradient is not finite: "warn"
            (`SolverWarning`), "raise" (`SolverError`) or "ignore".

    Raises:
        TypeError, ValueError: bad arguments, as for `linearize`.
        StaleSystemError: `system` was built from something that has changed.
    """
    check_on_failure(on_failure)
    tree.check_params("upper", upper)
    tree.check_params("lower", lower)
    if system is None:
        if lower_batches is None:
            raise ValueError("lower_batches is missing; pass the batches of the lower objective, or a system")
        system = linearize(
            problem,
            upper,
            lower,
            lower_batches,
            solver=solver,
            hvp=hvp,
            damping=damping or 0.0,
            tikhonov=0.0 if tikhonov is None else tikhonov,
            implicit=implicit,
        )
    else:
        _check_same(system, problem, lower, lower_batches, solver, hvp, damping, tikhonov, implicit)
        system.check_fresh(upper, lower)
    return through_system(
        system, upper, lower, upper_batch, solve=lambda v: system.solve(v, x0=x0), on_failure=on_failure
    )


def through_system(
    system: System,
    upper: Params,
    lower: Params,
    upper_batch: Any,
    *,
    solve: Callable[[Params], Solution],
    on_failure: OnFailure,
) -> Hypergradient:
    """Hypergradient with F taken at `lower` and the cross term at the system's point; `solve` gives x for dF/dy."""
    loss, direct, v = upper_derivatives(system.problem, upper, lower, system.implicit, upper_batch)
    solution = solve(v)
    if not solution.status.ok:
        residual = solution.residual_norms[1]
        measured = "residual not measured" if math.isnan(residual) else f"relative residual {residual:.2e}"
        message = f"{solution.status.value} ({measured} after {solution.iterations} iterations)"
        report_failure(message, solution, on_failure, stacklevel=4)
    implicit_part = tree.scale(-1.0, system.cross(solution.value, upper))
    grad = tree.add(direct, implicit_part)
    if solution.status.ok and not tree.all_finite(grad):
        report_failure(_not_finite(direct, implicit_part), solution, on_failure, stacklevel=4)
    gradient, noise = system.gradient_and_noise(upper)
    return Hypergradient(
        grad=grad,
        direct=direct,
        implicit=implicit_part,
        loss=loss,
        solution=solution,
        stationarity=float(tree.norm(gradient)),
        noise=noise,
    )


def _not_finite(direct: Params, implicit_part: Params) -> str:
    """Which part of a hypergradient is not finite though its solve succeeded, and what to check."""
    causes = []
    if not tree.all_finite(direct):
        causes.append("the direct part dF/dx is not finite; check how upper_objective depends on the upper variables")
    if not tree.all_finite(implicit_part):
        causes.append(
            "the cross term (d2G/dxdy) x is not finite; check how lower_objective and regularizer depend on the upper "
            "variables"
        )
    cause = "; ".join(causes) or "the direct part and the cross term are finite but their sum is not"
    return f"non-finite: {cause} (square roots, norms and logarithms have no finite derivative at 0)"


def check_on_failure(on_failure: OnFailure) -> None:
    """Raise ValueError for a word that is not one of the three."""
    if on_failure not in get_args(OnFailure):
        raise ValueError(f"on_failure must be one of {get_args(OnFailure)}, got {on_failure!r}")


def report_failure(message: str, solution: Solution | None, on_failure: OnFailure, *, stacklevel: int) -> None:
    """The one place where a failure is acted upon; `stacklevel` leads from here to the user's call."""
    if on_failure == "raise":
        raise SolverError(message, solution)
    if on_failure == "warn":
        warnings.warn(message, SolverWarning, stacklevel=stacklevel)


def _check_same(
    system: System,
    problem: Problem,
    lower: Params,
    lower_batches: Sequence[Any] | None,
    solver: Solver | None,
    hvp: HVP | None,
    damping: float | None,
    tikhonov: Tikhonov | None,
    implicit: Implicit | None,
) -> None:
    if problem is not system.problem:
        raise ValueError("problem: the system was built from another Problem object; call linearize for this one")
    if lower_batches is not None and (
        len(lower_batches) != len(system.lower_batches)
        or any(a is not b for a, b in zip(lower_batches, system.lower_batches, strict=True))
    ):
        raise ValueError("lower_batches: other batches than the system's; leave them out or call linearize again")
    hvp = system.hvp if hvp == "auto" and isinstance(system.hvp, Automatic) else hvp
    names = None if implicit is None else implicit_matches(implicit, lower)
    for name, given, own in (
        ("solver", solver, system.solver),
        ("hvp", hvp, system.hvp),
        ("damping", damping, system.damping),
        ("tikhonov", tikhonov, system.tikhonov),
        ("implicit", names, system.implicit),
    ):
        if given is not None and given != own:
            raise ValueError(
                f"{name}={given!r} does not match the system, which was built with {own!r}; leave it out or call "
                "linearize again"
            )
