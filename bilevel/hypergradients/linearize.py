"""From a problem, its variables and batches to the linear system behind a hypergradient."""

from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any

from bilevel import tree
from bilevel.checks import check_kind, check_number, check_variables, warn_outside
from bilevel.hypergradients.residual_system import ProximalSystem, ResidualSystem
from bilevel.hypergradients.result import SolverWarning
from bilevel.hypergradients.system import System
from bilevel.linear import CG, GMRES, Solver
from bilevel.lower import (
    ProximalProblem,
    ResidualProblem,
    Selection,
    Tikhonov,
    check_batches,
    check_tikhonov,
    check_tikhonov_names,
    differentiates,
    explaining_batches,
    selected,
)
from bilevel.problem import Problem
from bilevel.products import HVP, as_provider
from bilevel.tree import Params


@differentiates
def linearize(
    problem: Problem,
    upper: Params,
    lower: Params,
    lower_batches: Sequence[Any],
    *,
    solver: Solver | None = None,
    hvp: HVP | None = None,
    damping: float = 0.0,
    tikhonov: Tikhonov = 0.0,
    implicit: Selection | None = None,
) -> System:
    r"""Build the linear system of the implicit function theorem at (upper, lower).

    With a regularizer r and :math:`c = \lambda + \text{damping} > 0`:

    .. math:: A = \frac{1}{c} \frac{\partial^2 L}{\partial y^2} + \frac{\partial^2 r}{\partial y^2} + \text{tikhonov},
       \qquad \text{cross} = \frac{1}{c} \frac{\partial^2 L}{\partial x \partial y}
       + \frac{\partial^2 r}{\partial x \partial y},

    so that BiSSL's A is I + H/c (its Algorithm 2 and appendix B.3). Without one, A = d2L/dydy + tikhonov and
    cross = d2L/dxdy. L is the mean over `lower_batches` (and over ranks). Random masks are drawn once per batch and
    stay the same for every product. Curvature that an operation of L or r loses is warned of (`SolverWarning`).

    For a `bilevel.lower.ResidualProblem`, a lower level S(x, y) = 0 that is no smooth minimum,

    .. math:: A = \Big(\frac{\partial S}{\partial y}\Big)^{\!\top} + \text{tikhonov}, \qquad
       \text{cross} = \Big(\frac{\partial S}{\partial x}\Big)^{\!\top}

    with S = y - T(x, y) for fixed points and proximal problems; A is not symmetric.

    Args:
        upper, lower: variables; the system keeps them and is stale once they change.
        lower_batches: a sequence of batches, whatever the Problem's lower_objective takes.
        solver: default ``CG()``, and ``GMRES()`` for a `ResidualProblem`.
        hvp: default ``ReverseOverReverse()``; "auto" measures the exact providers and takes the fastest that works
            (``system.hvp.report``). Of a fixed point or a root there are vector-Jacobian products alone.
        damping: added to the regularization weight in the whole system; needs a regularizer.
        tikhonov: Tikhonov's, added to A alone: one number, or one per lower name (0 where left out).
        implicit: names, or a predicate on names, of the lower variables that respond to the upper ones; default the
            Problem's `implicit`.

    Raises:
        TypeError: no instance of a Problem; variables that are not Params; an `implicit` that is a bare string; batches
            that are not a sequence, such as a DataLoader.
        ValueError: no batches; an unknown or empty `implicit`; a negative regularization weight or damping; damping
            without a regularizer; an unknown name in `tikhonov`; for a `ResidualProblem` a solver that needs a
            symmetric A, damping, or a provider that has no meaning there.
    """
    check_kind("problem", problem, Problem, "an instance of a Problem")
    tree.check_params("upper", upper)
    check_variables("lower", lower)
    check_batches(lower_batches)
    with explaining_batches(lower_batches):
        system = make_system(
            problem,
            upper,
            lower,
            lower_batches,
            solver=solver,
            hvp=hvp,
            damping=damping,
            tikhonov=tikhonov,
            implicit=implicit,
        )
    lost = system.curvature.lost()
    if lost is not None:
        warn_outside(lost, SolverWarning)
    return system


def make_system(
    problem: Problem,
    upper: Params,
    lower: Params,
    lower_batches: Sequence[Any],
    *,
    solver: Solver | None = None,
    hvp: HVP | None = None,
    damping: float = 0.0,
    tikhonov: Tikhonov = 0.0,
    implicit: Selection | None = None,
    at_once: bool = False,
) -> System:
    """`linearize` of variables and batches that were checked, without its warning of lost curvature, where a
    `Hypergradient.failure` carries it; `at_once` as for `System`."""
    check_number("damping", damping)
    check_number("regularization_weight", problem.regularization_weight)
    check_tikhonov(tikhonov)
    names = selected(problem, lower, implicit)
    check_tikhonov_names(tikhonov, names)
    check_kind("solver", solver, (Solver, NoneType), "a solver such as CG() or Neumann(10)")
    if isinstance(problem, ResidualProblem):
        solver = GMRES() if solver is None else solver
        solver.check_symmetry(problem.symmetric)
    return _kind_of_system(problem)(
        problem,
        upper,
        lower,
        lower_batches,
        solver=CG() if solver is None else solver,
        hvp=as_provider(hvp),
        damping=damping,
        tikhonov=tikhonov,
        implicit=names,
        at_once=at_once,
    )


def _kind_of_system(problem: Problem) -> Callable[..., System]:
    if isinstance(problem, ProximalProblem):
        return ProximalSystem
    return ResidualSystem if isinstance(problem, ResidualProblem) else System
