"""One hypergradient, by any method."""

from collections.abc import Sequence
from typing import Any

import torch

from bilevel import tree
from bilevel.checks import check_kind, check_variables
from bilevel.hypergradients.implicit import Implicit
from bilevel.hypergradients.method import Method, UpperStep, check_proposal, check_serves, check_stands_alone, unwritten
from bilevel.hypergradients.result import Hypergradient, OnFailure, check_on_failure, report_failure
from bilevel.linear import GMRES, Solver
from bilevel.lower import Draw, ResidualProblem, check_batch, check_batches, differentiates, explaining_batches
from bilevel.problem import Problem
from bilevel.tree import Params


@differentiates
def hypergradient(
    problem: Problem,
    upper: Params,
    lower: Params,
    method: Method | Solver | None = None,
    *,
    upper_batch: Any,
    lower_batches: Sequence[Any],
    on_failure: OnFailure = "warn",
) -> Hypergradient:
    r"""The hypergradient of F(x, y*(x)) at (x, y) by a method, by default `Implicit`:

    .. math:: \frac{dF}{dx} = \frac{\partial F}{\partial x}
       - \frac{\partial^2 G}{\partial x \partial y} A^{-1} \frac{\partial F}{\partial y}.

    Nothing is written: no variable, no ``.grad``, no buffer of a module that is bound by `functional_call`.

    Args:
        upper, lower: variables x and y.
        method: `Implicit`, `Unrolled`, `OneStep`, `SAMA`, `Penalty`, `StocBiO`, `TTSA` or one of your own; a solver
            stands for ``Implicit(solver)``. For a `bilevel.lower.ResidualProblem` (a fixed point, a proximal problem, a
            root) the default is ``Implicit(GMRES())``, and `Implicit` alone serves. What a method carries from step to
            step in a `Trainer` starts afresh here.
        upper_batch: the batch of F.
        lower_batches: sequence of batches (``list(itertools.islice(loader, K))`` of a DataLoader), ``[(X, t)]`` for one
            of two tensors; for all methods but `Unrolled` the lower objective is their mean.
        on_failure: what to do about a `Hypergradient.failure` (a solve whose status is not a success, a part that is
            not finite): "warn" (`SolverWarning`), "raise" (`SolverError`) or "ignore". A `Hypergradient.warning` is
            shown unless it is "ignore".

    A failure whose system broke down suggests a Tikhonov term that would have done, from 15 Lanczos steps (a product
    each, not counted in the solution): none with "ignore", with "raise" at the first such failure of a problem and of
    what is added to its A, with "warn" at the first one of the problem's type; and again where a solve meets curvature
    beyond what they found.

    For several right-hand sides with one linear system, or a solve from a given start, see `linearize` and
    `System.hypergradient`. The result is plain numbers: it has no graph, and torch.func transforms around the call are
    refused. Under torch.no_grad it is the same; autocast around the call does not reach it.

    Raises:
        TypeError, ValueError: bad arguments, as for the method; lower variables that are frozen
            (requires_grad=False beside others that require gradients) or share memory; variables that no objective
            reaches.
        RuntimeError: under torch.inference_mode.
    """
    check_kind("problem", problem, Problem, "an instance of a Problem")
    method = as_method(method, problem)
    check_serves(method, problem)
    check_stands_alone(method)
    check_on_failure(on_failure)
    tree.check_params("upper", upper)
    check_variables("lower", lower)
    check_batches(lower_batches)
    check_batch("upper_batch", [upper_batch])
    draws = once_drawn(method, upper_batch, lower_batches)
    step = UpperStep(problem, upper, lower, upper_batch, tuple(lower_batches), on_failure=on_failure, **draws)
    with explaining_batches(lower_batches):
        result = propose_once(step, method)
    report_failure(result, on_failure)
    return result


def propose_once(step: UpperStep, method: Method) -> Hypergradient:
    """What a method proposes for a first and only upper step."""
    with unwritten(step.upper, step.lower):
        proposal = method.propose(step, {}, method.prepare(step, {}))
    result = check_proposal(method, proposal, step.upper, step.lower).result
    if result is None:
        raise ValueError(
            f"{type(method).__name__}: the Proposal has no hypergradient (result=None); this method can be used in a "
            "Trainer alone"
        )
    return result


def once_drawn(method: Method, upper_batch: Any, lower_batches: Sequence[Any]) -> dict[str, Any]:
    """The samples of an `UpperStep` of a method that draws its own: the given batches, again and again where they do
    not suffice."""
    if not method.lower_draws:
        return {}

    def drawn(count: int, batches: Sequence[Any]) -> tuple[Draw, ...]:
        return tuple(Draw(batches[k % len(batches)], int(torch.randint(2**31 - 1, ()))) for k in range(count))

    lower, upper = drawn(method.lower_draws, lower_batches), drawn(method.upper_draws, [upper_batch])
    return {"lower_draws": lower, "upper_draws": upper}


def as_method(method: object, problem: Problem | None = None) -> Method:
    """The method that an argument stands for: itself, ``Implicit(solver)`` for a solver, ``Implicit()`` for None, and
    ``Implicit(GMRES())`` where `problem` is a `bilevel.lower.ResidualProblem`.

    Raises:
        TypeError: anything else.
    """
    if method is None:
        return Implicit(GMRES()) if isinstance(problem, ResidualProblem) else Implicit()
    if isinstance(method, Solver):
        return Implicit(method)
    if not isinstance(method, Method):
        shown = f"the class {method.__name__}" if isinstance(method, type) else repr(method)
        raise TypeError(
            f"method must be a Method such as Implicit(CG()), OneStep(0.1) or Unrolled(SGDUpdate(0.1)), or a solver "
            f"such as CG(), got {shown}"
        )
    return method
