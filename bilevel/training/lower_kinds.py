"""Lower steps of a training whose lower level is no smooth minimum."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from bilevel.lower import ProximalProblem, ResidualProblem, apply_map, check_step_size
from bilevel.problem import Problem
from bilevel.training.level import Level
from bilevel.tree import Params


def check_lower_kind(problem: Problem, lower: Level) -> None:
    """Refuse a lower level whose steps would not lead to the solution of such a problem.

    Raises:
        ValueError: a micro-batch of a fixed point or a root; of a proximal problem an optimizer other than SGD,
            several learning rates or momenta, a norm limit, momentum of at least 1.
    """
    name = type(problem).__name__
    if isinstance(problem, ResidualProblem) and not isinstance(problem, ProximalProblem):
        if lower.micro_batch is not None:
            raise ValueError(
                f"lower: micro_batch={lower.micro_batch} cuts the batch of a lower objective into chunks, and {name} "
                "has a residual in its place; leave it out"
            )
        return
    if not isinstance(problem, ProximalProblem):
        return
    check_step_size(problem)
    if not isinstance(lower.optimizer, torch.optim.SGD):
        raise ValueError(
            f"lower: {type(lower.optimizer).__name__} scales every entry by itself, and with a proximal map after its "
            f"step it would not end at the solution of {name}; take torch.optim.SGD, with momentum if you like, or "
            "solve the lower level in a loop of your own and call hypergradient"
        )
    if lower.max_grad_norm is not None:
        raise ValueError(
            f"lower: max_grad_norm={lower.max_grad_norm:g} shortens the gradient but not the proximal map after it, so "
            f"that the steps would not end at the solution of {name}; leave it out, or lower the learning rate"
        )
    long_run_step(lower)


def finish_step(problem: Problem, upper: Params, lower: Level) -> Callable[[], None]:
    """What is left to do after the optimizer's next step: the proximal map with that step's length, where there is one.

    It is asked for before the step, after which a schedule may have moved the learning rate.
    """
    if not isinstance(problem, ProximalProblem):
        return lambda: None
    step = long_run_step(lower)

    @torch.no_grad()
    def finish() -> None:
        for name, moved in apply_map(problem, upper, lower.params, step).items():
            lower.params[name].copy_(moved)

    return finish


def long_run_step(lower: Level) -> float:
    """lr (1 - dampening) / (1 - momentum): by how much a gradient moves the variables over all later steps of SGD.

    With this step in the map, y* is where the steps stay: the momentum is there 1 / (1 - momentum) gradients.

    Raises:
        ValueError: a momentum of 1 or more, with which that is infinite; parameter groups that differ in it.
    """
    options = {_options(group) for group in lower.optimizer.param_groups}
    if len(options) > 1:
        raise ValueError(
            f"lower: the optimizer's parameter groups differ in lr, momentum or dampening, {sorted(options)}, and a "
            "proximal map has one step; give all groups, and what a schedule makes of them, the same"
        )
    ((rate, momentum, dampening),) = options
    if momentum >= 1.0:
        raise ValueError(f"lower: momentum={momentum:g} never forgets a gradient; take one below 1")
    return rate if momentum == 0.0 else rate * (1.0 - dampening) / (1.0 - momentum)


def _options(group: Mapping[str, Any]) -> tuple[float, float, float]:
    return float(group["lr"]), float(group["momentum"]), float(group["dampening"])
