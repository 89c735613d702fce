"""Arguments of a trainer that do not fit together, refused before the first step."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch

from bilevel import tree
from bilevel.hypergradients import OnFailure
from bilevel.problem import Problem
from bilevel.products import check_size
from bilevel.training.schedule import AlternatingSchedule
from bilevel.tree import Params

Levels = Mapping[str, Params]


def check_optimizers(variables: Levels, optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
    """Raise ValueError unless each level's optimizer holds exactly its tensors; warn of the lower one's decay."""
    for level, own in variables.items():
        tree.check_params(level, own)
        held = {id(p) for group in optimizers[level].param_groups for p in group["params"]}
        missing = [name for name, leaf in own.items() if id(leaf) not in held]
        if missing or len(held) != len(own):
            raise ValueError(
                f"{level}_optimizer must hold exactly the {len(own)} tensors of `{level}`; it holds "
                f"{len(held)} and misses {missing[:3]}. Build it from list({level}.values())"
            )
    if any(group.get("weight_decay", 0.0) for group in optimizers["lower"].param_groups):
        warnings.warn(
            "the lower optimizer's weight decay is not part of the lower objective: stationarity will not reach 0, "
            "and the hypergradient is that of the objective without it",
            stacklevel=3,
        )


def check_options(
    hessian_batches: Any, micro_batch: Any, nonfinite_skips: Any, max_grad_norm: float | None, on_failure: Any
) -> None:
    """Raise ValueError for a number or word out of its range."""
    for name, value, least in (("hessian_batches", hessian_batches, 1), ("nonfinite_skips", nonfinite_skips, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if micro_batch is not None:
        check_size("micro_batch", micro_batch)
    if on_failure not in get_args(OnFailure):
        raise ValueError(f"on_failure must be one of {get_args(OnFailure)}, got {on_failure!r}")
    if max_grad_norm is not None and not max_grad_norm > 0.0:
        raise ValueError(f"max_grad_norm must be positive or None, got {max_grad_norm}")


def check_aggregate(problem: Problem, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError where one solve cannot serve an alternation; `groups` are the upper optimizer's."""
    if problem.curvature_depends_on_upper:
        raise ValueError(
            "aggregate=True: one solve serves several upper steps only where the curvature does not depend on the "
            "upper variables; set curvature_depends_on_upper = False in the Problem if that is so, or leave "
            "aggregate out"
        )
    if len({group["lr"] for group in groups}) > 1:
        raise ValueError(
            "aggregate=True: the upper optimizer's parameter groups have different learning rates, but the steps "
            "of an alternation are summed by one; give all groups one rate, or leave aggregate out"
        )


def check_adaptation(schedule: AlternatingSchedule, pairs: Mapping[str, str], variables: Levels) -> None:
    """Raise ValueError where the schedule adapts nothing, or what is not there."""
    upper, lower = variables["upper"], variables["lower"]
    if schedule.adaptation_every is not None and not pairs:
        raise ValueError("the schedule adapts but adaptation_pairs is empty; pass {'upper name': 'lower name'}")
    for upper_name, lower_name in pairs.items():
        if upper_name not in upper or lower_name not in lower:
            raise ValueError(f"adaptation_pairs: no upper {upper_name!r} or no lower {lower_name!r}")
        if upper[upper_name].shape != lower[lower_name].shape:
            raise ValueError(f"adaptation_pairs: {upper_name!r} and {lower_name!r} differ in shape")
