"""Hypergradients that solve no system: the inverse is replaced by the next step of the lower optimizer.

Every function takes the cross term from an HVP provider: with `FiniteDifference`, their default, only gradients are
computed; with an exact one the same formula without its differencing error.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bilevel import tree
from bilevel.hypergradients.hypergradient import Hypergradient, OnFailure, check_on_failure, through_system
from bilevel.hypergradients.system import Implicit, System, linearize
from bilevel.hypergradients.updates import State, Update, starting_state
from bilevel.linear import ApproximateInverse, Identity
from bilevel.problem import Problem
from bilevel.products import HVP, FiniteDifference
from bilevel.tree import Params


def darts_hypergradient(
    problem: Problem,
    upper: Params,
    lower: Params,
    *,
    upper_batch: Any,
    lower_batches: Sequence[Any],
    step_size: float,
    hvp: HVP | None = None,
    implicit: Implicit | None = None,
    on_failure: OnFailure = "warn",
) -> Hypergradient:
    r"""Hypergradient through one virtual step of gradient descent (DARTS; Liu, Simonyan & Yang 2019, eq. 7-8):

    .. math:: y' = y - \xi \frac{\partial G}{\partial y}(x, y), \qquad
       \frac{dF}{dx} = \frac{\partial F}{\partial x}(x, y')
       - \xi \frac{\partial^2 G}{\partial x \partial y}(x, y)\, \frac{\partial F}{\partial y}(x, y').

    With an exact provider it equals one unrolled step of ``SGDUpdate(step_size)``.

    Args:
        upper, lower: x and y; y need not have converged, and is not moved.
        lower_batches: sequence of batches, the lower objective being their mean.
        step_size: xi > 0, most often the lower optimizer's learning rate.
        hvp: default ``FiniteDifference()``. The paper's own formula, with a step of 0.01 / ||dF/dy'||, is
            ``FiniteDifference(step=0.01)``. The regularizer's cross term is exact in any case.
        implicit: as for `linearize`; only these variables make the virtual step.
        on_failure: as for `hypergradient`.

    Returns:
        A `Hypergradient`; its `stationarity` is that of y, its `solution` holds xi dF/dy' (times lambda where there is
        a regularizer, by the system's scale) and no residual.

    Raises:
        TypeError, ValueError: bad arguments, as for `linearize`; a step size that is not positive.
    """
    check_on_failure(on_failure)
    if isinstance(step_size, bool) or not isinstance(step_size, (int, float)) or not 0.0 < step_size < float("inf"):
        raise ValueError(f"step_size must be a positive number, got {step_size!r}; give the lower learning rate")
    system = _cross_terms(problem, upper, lower, lower_batches, hvp, implicit)
    virtual = {**lower, **tree.axpy(-step_size, system.gradient(), system.variables(lower))}
    solver = ApproximateInverse(lambda b: tree.scale(step_size * system.weight, b))
    return through_system(
        system,
        upper,
        virtual,
        upper_batch,
        solve=lambda v: solver.solve(system.operator, v),
        on_failure=on_failure,
    )


def sama_hypergradient(
    problem: Problem,
    upper: Params,
    lower: Params,
    *,
    upper_batch: Any,
    lower_batches: Sequence[Any],
    update: Update,
    state: State | None = None,
    hvp: HVP | None = None,
    implicit: Implicit | None = None,
    on_failure: OnFailure = "warn",
) -> Hypergradient:
    r"""Hypergradient with the inverse replaced by the optimizer's own sensitivity (SAMA; Choe et al. 2023, section 3):

    .. math:: \frac{dF}{dx} = \frac{\partial F}{\partial x} - \frac{\partial^2 G}{\partial x \partial y}\, D\,
       \frac{\partial F}{\partial y}, \qquad D = - \frac{\partial U}{\partial g}(y, g, s),

    where U(y, g, s) is where the lower optimizer would go next from y with the gradient g = dG/dy. D is the learning
    rate for plain descent, and a diagonal for Adam,

    .. math:: D = \frac{\alpha}{1 - \beta_1^t} \Big[\frac{1 - \beta_1}{r + \epsilon}
       - \frac{(1 - \beta_2)\, m\, g}{(1 - \beta_2^t)\, r\, (r + \epsilon)^2}\Big], \qquad
       r = \sqrt{s / (1 - \beta_2^t)},

    with the moments m, s after that step. It is taken by automatic differentiation, for any `Update`. The paper's
    adjustment of the lower variables along D dF/dy is not made: nothing is written.

    Args:
        upper, lower: x and y; y should have nearly converged under the optimizer.
        lower_batches: sequence of batches, the lower objective being their mean.
        update, state: the lower optimizer and its state before its next step, as `from_optimizer` reads them off a
            live one; without a state the optimizer is a fresh one.
        hvp: default ``FiniteDifference()``. The regularizer's cross term is exact in any case.
        implicit, on_failure: as for `hypergradient`.

    Returns:
        A `Hypergradient`; its `solution` holds D dF/dy (times lambda where there is a regularizer, by the system's
        scale) and no residual.

    Raises:
        TypeError, ValueError: bad arguments, as for `linearize`; an `update` that is not one; a state that does
            not cover the variables.
    """
    check_on_failure(on_failure)
    if not isinstance(update, Update):
        raise TypeError(f"update must be an Update, such as AdamUpdate(lr=1e-3), got {type(update).__name__}")
    system = _cross_terms(problem, upper, lower, lower_batches, hvp, implicit)
    sensitivity = _sensitivity(update, tree.detach(lower), system.gradient(), starting_state(update, lower, state))
    solver = ApproximateInverse(lambda b: tree.scale(system.weight, sensitivity(b)))
    return through_system(
        system,
        upper,
        lower,
        upper_batch,
        solve=lambda v: solver.solve(system.operator, v),
        on_failure=on_failure,
    )


def _cross_terms(
    problem: Problem,
    upper: Params,
    lower: Params,
    lower_batches: Sequence[Any],
    hvp: HVP | None,
    implicit: Implicit | None,
) -> System:
    """The system, of which only the gradient, the scale and the cross term are used."""
    provider = FiniteDifference() if hvp is None else hvp
    return linearize(problem, upper, lower, lower_batches, solver=Identity(), hvp=provider, implicit=implicit)


def _sensitivity(update: Update, lower: Params, gradient: Params, state: State) -> Callable[[Params], Params]:
    """b -> -(dU/dg)' b over the names of `gradient`; the other variables get no gradient."""

    @torch.enable_grad()
    def product(b: Params) -> Params:
        g = tree.as_variables(gradient)
        moved, _ = update.step(lower, {**tree.zeros_like(lower), **g}, state)
        return tree.scale(-1.0, tree.pullback({name: moved[name] for name in g}, b, [g])[0])

    return product
