"""The hypergradient of the penalised problem: first derivatives and a second copy of the lower variables."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch

from bilevel import tree
from bilevel.hypergradients.hypergradient import Hypergradient, OnFailure, check_on_failure, report_failure
from bilevel.hypergradients.system import Implicit, check_batches, implicit_names
from bilevel.hypergradients.updates import Update
from bilevel.lower import lower_derivatives, upper_derivatives
from bilevel.problem import Problem
from bilevel.tree import Params


def penalty_hypergradient(
    problem: Problem,
    upper: Params,
    lower: Params,
    *,
    upper_batch: Any,
    lower_batches: Sequence[Any],
    update: Update,
    penalty: float,
    penalized: Params | None = None,
    implicit: Implicit | None = None,
    on_failure: OnFailure = "warn",
) -> Hypergradient:
    r"""Hypergradient of the penalty formulation (F2SA; Kwon, Kwon, Wright & Nowak 2023):

    .. math:: z \approx \arg\min_z \; G(x, z) + F(x, z) / \sigma, \qquad
       \frac{dF}{dx} \approx \frac{\partial F}{\partial x}(x, z)
       + \sigma \Big[\frac{\partial G}{\partial x}(x, z) - \frac{\partial G}{\partial x}(x, y)\Big].

    z is trained here, one step of `update` for each lower batch. With exact minimizers y and z the error is of order
    1 / sigma (none if F is linear and G quadratic in y); what is missing to the minimum, and rounding, comes in
    multiplied by sigma, so a sigma that grows over the upper steps needs a z that is carried along.

    Args:
        upper, lower: x, and y at (nearly) a minimum of G.
        lower_batches: one step of z for each; both dG/dx are means over all of them, with the same random masks.
        update: the optimizer of z, with a fresh state.
        penalty: sigma > 0.
        penalized: where z starts, the former result's `lower`; default y.
        implicit: as for `linearize`; the other variables stay the same in y and z.
        on_failure: what to do about a hypergradient that is not finite, as for `unrolled_hypergradient`.

    Returns:
        A `Hypergradient` with `solution` None, `lower` z, and `stationarity` the norm of dG/dy at y.

    Raises:
        TypeError, ValueError: bad arguments, as for `linearize`; a penalty that is not positive; `penalized` with
            other names or shapes than `lower`.
    """
    check_on_failure(on_failure)
    _check_arguments(upper, lower, lower_batches, update, penalty, penalized)
    names = implicit_names(problem, lower, implicit)
    upper, lower = tree.detach(upper), tree.detach(lower)
    batches = [(batch, int(torch.randint(2**31 - 1, ()))) for batch in lower_batches]
    start = lower if penalized is None else penalized
    z = {name: start[name].detach() for name in names}
    final = {**lower, **_descend(problem, upper, lower, z, upper_batch, batches, update, penalty)}

    loss, direct, _ = upper_derivatives(problem, upper, final, names, upper_batch)
    at_z = [lower_derivatives(problem, upper, final, names, *drawn)[0] for drawn in batches]
    at_y = [lower_derivatives(problem, upper, lower, names, *drawn) for drawn in batches]
    response = tree.scale(penalty, tree.sub(_mean(at_z), _mean([x for x, _ in at_y])))
    grad = tree.add(direct, response)
    if not tree.all_finite(grad):
        report_failure(_NOT_FINITE, None, on_failure, stacklevel=3)
    stationarity = float(tree.norm(_mean([y for _, y in at_y])))
    return Hypergradient(grad, direct, response, loss, None, stationarity, final)


_NOT_FINITE = (
    "non-finite: the hypergradient of the penalised problem is not finite; lower the learning rate of the update or "
    "the penalty, or check the data"
)


def _descend(
    problem: Problem,
    upper: Params,
    lower: Params,
    z: Params,
    upper_batch: Any,
    batches: Sequence[tuple[Any, int]],
    update: Update,
    penalty: float,
) -> Params:
    """z after one step on ``G + F / sigma`` for each batch and its seed."""
    state, names = update.init(z), list(z)
    for batch, seed in batches:
        _, _, of_upper = upper_derivatives(problem, upper, {**lower, **z}, names, upper_batch)
        _, of_lower = lower_derivatives(problem, upper, {**lower, **z}, names, batch, seed)
        with torch.no_grad():
            z, state = update.step(z, tree.axpy(1.0 / penalty, of_upper, of_lower), state)
    return z


def _mean(trees: Sequence[Params]) -> Params:
    return tree.scale(1.0 / len(trees), reduce(tree.add, trees))


def _check_arguments(
    upper: Params,
    lower: Params,
    lower_batches: Sequence[Any],
    update: Update,
    penalty: float,
    penalized: Params | None,
) -> None:
    tree.check_params("upper", upper)
    tree.check_params("lower", lower)
    check_batches(lower_batches)
    if not isinstance(update, Update):
        raise TypeError(f"update must be an Update, such as SGDUpdate(lr=0.1), got {type(update).__name__}")
    if isinstance(penalty, bool) or not isinstance(penalty, (int, float)) or not 0.0 < penalty < float("inf"):
        raise ValueError(f"penalty must be a positive number, got {penalty!r}")
    if penalized is None:
        return
    tree.check_params("penalized", penalized)
    if {n: t.shape for n, t in penalized.items()} != {n: t.shape for n, t in lower.items()}:
        raise ValueError(
            f"penalized must have the names and shapes of lower, {list(lower)}, got {list(penalized)}; pass a former "
            "result's `lower`"
        )
