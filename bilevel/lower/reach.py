"""Which variables the objectives reach: a variable that none reaches gets a zero that looks like a result."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bilevel import tree
from bilevel.distributed import rank
from bilevel.lower.once import PerProblem
from bilevel.problem import Problem
from bilevel.products import reached
from bilevel.tree import Params

_REMEDY = (
    "compute from the tensors that it is given: functional_call(module, lower, args), where a direct call module(args) "
    "uses the module's own parameters, and no detach(), .data, .item() or torch.no_grad() between them and the loss"
)


@dataclass
class _ReachedUpper:
    """Upper variables that have been found in the graphs of F, and of L and r; None before they were examined."""

    of_upper: set[str] | None = None
    of_lower: set[str] | None = None
    judged: set[tuple[str, ...]] = field(default_factory=set)


_lower, _upper = PerProblem[set[tuple[str, ...]]](set), PerProblem(_ReachedUpper)


def check_lower_reached(name: str, outputs: object, lower: Params) -> None:
    """Raise unless the graph of an objective, or of its outputs, begins at some variable. For passes in which the lower
    variables alone require gradients, if any do: it is known for nothing.

    Raises:
        ValueError: it reaches none of the lower variables.
    """
    plain = torch.is_grad_enabled() and all(torch.func.debug_unwrap(leaf) is leaf for leaf in lower.values())
    if not plain or not any(leaf.requires_grad for leaf in lower.values()):
        return
    if not any(tensor.requires_grad for tensor in tree.tensors_in(outputs)):
        raise ValueError(_reaches_none(name, "lower", lower))


def examine_lower(problem: Problem, loss: Tensor, lower: Params) -> None:
    """Say once which lower variables the graph of L, without the regularizer, does not reach.

    Raises:
        ValueError: it reaches none of them.
    """
    examined = _lower.of(problem)
    if tuple(lower) in examined:
        return
    found = reached([loss], lower)
    if not found:
        raise ValueError(_reaches_none("lower_objective", "lower", lower))
    examined.add(tuple(lower))
    _list("lower_objective does not reach", "lower", set(lower) - found, lower)


def examine_upper(problem: Problem, loss: Tensor, upper: Params, lower: Params) -> None:
    """Take note of what F reaches.

    Raises:
        ValueError: it reaches none of the lower variables, so that the upper level does not see the lower one.
    """
    found = _upper.of(problem)
    if found.of_upper is not None and tuple(upper) in found.judged:
        return
    if not reached([loss], lower):
        raise ValueError(_reaches_none("upper_objective", "lower", lower))
    found.of_upper = reached([loss], upper)
    _judge_upper(problem, upper)


def examine_cross(problem: Problem, found: set[str], upper: Params) -> None:
    """Take note of the names of the upper variables that L or r reaches.

    Raises:
        ValueError: F reaches none either.
    """
    _upper.of(problem).of_lower = found
    _judge_upper(problem, upper)


def cross_examined(problem: Problem, upper: Params) -> bool:
    """Whether `examine_cross` has nothing more to find."""
    found = _upper.of(problem)
    return found.of_lower is not None and (found.of_upper is None or tuple(upper) in found.judged)


def _judge_upper(problem: Problem, upper: Params) -> None:
    """Raise where no objective reaches any upper variable; say once which ones none reaches."""
    found = _upper.of(problem)
    if not upper or found.of_upper is None or found.of_lower is None:
        return
    missing = set(upper) - found.of_upper - found.of_lower
    if len(missing) == len(upper):
        found.of_upper = found.of_lower = None
        raise ValueError(_reaches_none("no objective, neither upper nor lower,", "upper", upper))
    if tuple(upper) not in found.judged:
        found.judged.add(tuple(upper))
        _list("no objective reaches", "upper", missing, upper)


def _reaches_none(name: str, level: str, variables: Params) -> str:
    verb = "reaches any" if name.startswith("no ") else "reaches none"
    return (
        f"{name} {verb} of the {level} variables {_shown(variables)}, so that its derivatives in them are all zero (a "
        f"regularizer would only hide that); {_REMEDY}"
    )


def _list(what: str, level: str, missing: set[str], variables: Params) -> None:
    if missing and rank() == 0:
        names = [name for name in variables if name in missing]
        logging.getLogger("bilevel").warning(
            "%s %s of the %d %s variables on this batch: %s. Their derivatives are zero; leave them out of the level "
            "if that is always so",
            *(what, len(names), len(variables), level, _shown(names)),
        )


def _shown(names: Iterable[str]) -> str:
    names = list(names)
    return f"{names[:8]}" if len(names) <= 8 else f"{names[:8]} and {len(names) - 8} more"
