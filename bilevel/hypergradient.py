"""The hypergradient by the implicit function theorem."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bilevel import distributed, tree
from bilevel.hvp import HVPProvider
from bilevel.modules import curvature_pass
from bilevel.problem import Problem
from bilevel.solution import Solution
from bilevel.solvers import Solver
from bilevel.system import Implicit, Shift, System, check_scalar, implicit_matches, linearize
from bilevel.tree import Params

OnFailure = Literal["warn", "raise", "ignore"]


class SolverWarning(UserWarning):
    """A solve did not do what was asked of it; the message carries its `Status`."""


class SolverError(RuntimeError):
    """As `SolverWarning`, where ``on_failure="raise"``; `solution` holds what the solver had."""

    def __init__(self, message: str, solution: Solution) -> None:
        super().__init__(message)
        self.solution = solution


@dataclass(frozen=True)
class Hypergradient:
    """dF(x, y*(x))/dx and what is known about it.

    Attributes:
        grad: ``direct + implicit``, over the upper variables.
        direct: dF/dx at fixed y.
        implicit: ``-(cross term) x`` with A x = dF/dy.
        loss: F, 0-d and detached.
        solution: of the linear system, None where nothing is solved.
        stationarity: norm of the lower gradient dG/dy over the implicit variables. The implicit function theorem
            assumes that it is 0.
    """

    grad: Params
    direct: Params
    implicit: Params
    loss: Tensor
    solution: Solution | None
    stationarity: float


def hypergradient(
    problem: Problem,
    upper: Params,
    lower: Params,
    *,
    upper_batch: Any,
    lower_batches: Sequence[Any] | None = None,
    solver: Solver | None = None,
    hvp: HVPProvider | None = None,
    damping: float | None = None,
    shift: Shift | None = None,
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
        solver, hvp, damping, shift, implicit: as for `linearize` (defaults ``CG()``, ``ReverseOverReverse()``, 0, 0,
            the Problem's). With `system` they may be left out; giving another value than the system's raises.
        system: the result of `linearize`, reused; it must still be fresh.
        x0: first iterate of the solve, for example a former ``solution.value``.
        on_failure: what to do when the solve's status is not a success: "warn" (`SolverWarning`), "raise"
            (`SolverError`) or "ignore".

    Raises:
        TypeError, ValueError: bad arguments, as for `linearize`.
        StaleSystemError: `system` was built from something that has changed.
    """
    if on_failure not in get_args(OnFailure):
        raise ValueError(f"on_failure must be one of {get_args(OnFailure)}, got {on_failure!r}")
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
            shift=0.0 if shift is None else shift,
            implicit=implicit,
        )
    else:
        _check_same(system, problem, lower, lower_batches, solver, hvp, damping, shift, implicit)
        system.check_fresh(upper, lower)
    x, y = tree.as_variables(upper), tree.as_variables(system.variables(lower))
    with torch.enable_grad(), curvature_pass():
        fixed = {name: leaf.detach() for name, leaf in lower.items()}
        loss = check_scalar("upper_objective", problem.upper_objective(x, {**fixed, **y}, upper_batch))
    both = tree.gradients(loss, {**_tagged("x", x), **_tagged("y", y)})
    both = distributed.mean_over_ranks(both)
    direct, v = _untagged("x", both), _untagged("y", both)
    solution = system.solve(v, x0=x0)
    _report(solution, on_failure)
    implicit_part = tree.scale(-1.0, system.cross(solution.value, upper))
    return Hypergradient(
        grad=tree.add(direct, implicit_part),
        direct=direct,
        implicit=implicit_part,
        loss=distributed.mean_over_ranks({"loss": loss.detach()})["loss"],
        solution=solution,
        stationarity=system.stationarity(upper),
    )


def _report(solution: Solution, on_failure: OnFailure) -> None:
    """The one place where a failed solve is acted upon."""
    if solution.status.ok or on_failure == "ignore":
        return
    residual = solution.residual_norms[1]
    measured = "residual not measured" if math.isnan(residual) else f"relative residual {residual:.2e}"
    message = f"{solution.status.value} ({measured} after {solution.iterations} iterations)"
    if on_failure == "raise":
        raise SolverError(message, solution)
    warnings.warn(message, SolverWarning, stacklevel=3)


def _check_same(
    system: System,
    problem: Problem,
    lower: Params,
    lower_batches: Sequence[Any] | None,
    solver: Solver | None,
    hvp: HVPProvider | None,
    damping: float | None,
    shift: Shift | None,
    implicit: Implicit | None,
) -> None:
    if problem is not system.problem:
        raise ValueError("problem: the system was built from another Problem object; call linearize for this one")
    if lower_batches is not None and (
        len(lower_batches) != len(system.lower_batches)
        or any(a is not b for a, b in zip(lower_batches, system.lower_batches, strict=True))
    ):
        raise ValueError("lower_batches: other batches than the system's; leave them out or call linearize again")
    names = None if implicit is None else implicit_matches(implicit, lower)
    for name, given, own in (
        ("solver", solver, system.solver),
        ("hvp", hvp, system.hvp),
        ("damping", damping, system.damping),
        ("shift", shift, system.shift),
        ("implicit", names, system.implicit),
    ):
        if given is not None and given != own:
            raise ValueError(
                f"{name}={given!r} does not match the system, which was built with {own!r}; leave it out or call "
                "linearize again"
            )


def _tagged(tag: str, x: Params) -> Params:
    return {f"{tag} {name}": leaf for name, leaf in x.items()}


def _untagged(tag: str, x: Params) -> Params:
    return {name.removeprefix(f"{tag} "): leaf for name, leaf in x.items() if name.startswith(f"{tag} ")}
