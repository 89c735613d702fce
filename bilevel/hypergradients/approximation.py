"""What methods share that put a linear map in place of the inverse and take only the cross term from a system."""

from collections.abc import Callable

from bilevel import tree
from bilevel.hypergradients.linearize import make_system
from bilevel.hypergradients.method import MethodState, Proposal, UpperStep
from bilevel.hypergradients.system import System, through_system
from bilevel.linear import ApproximateInverse, Identity
from bilevel.lower import Selection
from bilevel.products import HVP
from bilevel.tree import Params


def unsolved_system(step: UpperStep, hvp: HVP, implicit: Selection | None) -> System:
    """The system of a step, of which the gradient, the scale and the cross term are used, and no solve."""
    step.watch()
    return make_system(
        step.problem,
        step.upper,
        step.lower,
        step.lower_batches,
        solver=Identity(),
        hvp=hvp,
        implicit=implicit,
        at_once=True,
    )


def by_approximation(
    step: UpperStep, state: MethodState, system: System, lower: Params, inverse: Callable[[Params], Params]
) -> Proposal:
    """A step with F taken at `lower`, and `inverse` in place of the inverse of d2G/dydy; `state` stays."""
    solver = ApproximateInverse(lambda b: tree.scale(system.weight, inverse(b)))
    result = through_system(
        system, step.upper, lower, step.upper_batch, solve=lambda v: solver.solve(system.operator, v)
    )
    return Proposal(result.grad, result.loss, state, result)
