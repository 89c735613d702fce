"""The two levels' objectives and their first derivatives, as hypergradients and lower steps evaluate them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel import distributed, tree
from bilevel.lower.kinds.fields import training_residual
from bilevel.lower.kinds.proximal import ProximalProblem
from bilevel.lower.kinds.residual import ResidualProblem
from bilevel.lower.objectives import check_scalar
from bilevel.lower.reach import (
    cross_examined,
    examine_cross,
    examine_lower,
    examine_upper,
)
from bilevel.nn import curvature_pass, own_draws, training_pass
from bilevel.problem import Problem
from bilevel.products import micro_batched_gradient, reached
from bilevel.tree import Params


def upper_derivatives(
    problem: Problem, upper: Params, lower: Params, names: Sequence[str], batch: Any
) -> tuple[Tensor, Params, Params]:
    """F, dF/dx and dF/dy over the lower variables `names`, averaged over the ranks."""
    x, y = tree.as_variables(upper), tree.as_variables({name: lower[name] for name in names})
    with torch.enable_grad(), own_draws(), curvature_pass():
        loss = upper_graph(problem, x, y, lower, batch)
    return _averaged(loss, x, y)


def lower_derivatives(
    problem: Problem, upper: Params, lower: Params, names: Sequence[str], batch: Any, seed: int
) -> tuple[Params, Params]:
    """dG/dx and dG/dy over the lower variables `names`, averaged over the ranks; `seed` as in `lower_value`."""
    x, y = tree.as_variables(upper), tree.as_variables({name: lower[name] for name in names})
    with torch.enable_grad():
        value = lower_value(problem, x, {**tree.detach(lower), **y}, batch, seed)
    return _averaged(value, x, y)[1:]


def training_derivatives(
    problem: Problem,
    upper: Params,
    lower: Params,
    batch: Any,
    *,
    micro_batch: int | None = None,
    seed: int | None = None,
    write_buffers: bool = True,
) -> tuple[Tensor, Params]:
    """L, and dG/dy of G = L + lambda r over all lower variables, averaged over the ranks, by an ordinary pass: it
    writes buffers and draws random masks from the default generators. Of a fixed point or a root, the norm of the
    residual S and S.

    Args:
        micro_batch: samples a chunk (`micro_batched_gradient`); None passes the batch at once.
        seed: random masks are those of `lower_value` with this seed; None draws them from the default generators.
        write_buffers: False makes a pass with a seed leave them.
    """
    if isinstance(problem, ResidualProblem) and not isinstance(problem, ProximalProblem):
        return training_residual(problem, upper, lower, batch, seed=seed, write_buffers=write_buffers)
    x, y = tree.detach(upper), tree.as_variables(lower)
    if micro_batch is None:
        with own_draws() if seed is None else training_pass(seed, write_buffers=write_buffers):
            loss = check_scalar("lower_objective", problem.lower_objective(x, y, batch))
        examine_lower(problem, "lower_objective", loss, x, y)
        gradient = tree.gradients(loss, y)
    else:

        def outputs(variables: Params, chunk: Any) -> Any:
            z = problem.lower_outputs(x, variables, chunk)
            examine_lower(problem, "lower_outputs", z, x, variables)
            return z

        loss, gradient = micro_batched_gradient(
            outputs,
            lambda z: check_scalar("lower_output_loss", problem.lower_output_loss(x, z, batch)),
            y,
            problem.split_batch(batch, micro_batch),
        )
    penalty = problem.regularizer(x, y)
    if penalty is not None:
        gradient = tree.axpy(problem.regularization_weight, tree.gradients(penalty, y), gradient)
    loss, gradient = distributed.mean_with_gradients(loss.detach(), gradient)
    return loss, gradient


def lower_value(problem: Problem, upper: Params, lower: Params, batch: Any, seed: int) -> Tensor:
    """G = L + lambda r on one batch, 0-d, writing no buffer; equal seeds give equal random masks."""
    with curvature_pass(seed):
        return lower_graph(problem, upper, lower, batch)


def lower_graph(problem: Problem, upper: Params, lower: Params, batch: Any) -> Tensor:
    """G = L + lambda r on one batch, 0-d, in the pass that surrounds the call."""
    loss = check_scalar("lower_objective", problem.lower_objective(upper, lower, batch))
    penalty = problem.regularizer(upper, lower)
    if torch.is_grad_enabled():
        _examine(problem, [loss] if penalty is None else [loss, penalty], upper, lower)
    if penalty is None:
        return loss
    return loss + problem.regularization_weight * check_scalar("regularizer", penalty)


def upper_graph(problem: Problem, upper: Params, variables: Params, lower: Params, batch: Any) -> Tensor:
    """F on one batch, 0-d, in the pass that surrounds the call; `variables` take the place of some of `lower`."""
    everything = {name: variables[name] if name in variables else leaf.detach() for name, leaf in lower.items()}
    loss = check_scalar("upper_objective", problem.upper_objective(upper, everything, batch))
    examine_upper(problem, loss, upper, variables)
    return loss


def _examine(problem: Problem, values: Sequence[Tensor], upper: Params, lower: Params) -> None:
    """What L, the first of the values, reaches of the lower variables, and all of them of the upper ones."""
    examine_lower(problem, "lower_objective", values[0], upper, lower)
    if not cross_examined(problem, upper) and any(leaf.requires_grad for leaf in upper.values()):
        examine_cross(problem, reached(values, upper), upper)


def _averaged(value: Tensor, x: Params, y: Params) -> tuple[Tensor, Params, Params]:
    """The value and both gradients, in one backward pass and one collective."""
    mean, of_x, of_y = distributed.mean_with_gradients(value.detach(), *tree.joint_gradients(value, (x, y)))
    return mean, of_x, of_y
