"""Which variables the objectives reach: a variable that none reaches gets a zero that looks like a result."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bilevel import tree
from bilevel.distributed import rank
from bilevel.lower.per_problem import PerProblem
from bilevel.problem import Problem
from bilevel.products import beginnings, named_among
from bilevel.tree import Params

_REMEDY = (
    "compute from the tensors that it is given: functional_call(module, lower, args), where a direct call module(args) "
    "uses the module's own parameters, and no detach(), .data, .item() or torch.no_grad() between them and the loss"
)


@dataclass
class _ReachedUpper:
    """Upper variables that have been found in the graphs of F, and of L and r; None before they were examined. Whether
    those that none reaches were listed, and whether the lower level was seen to reach any."""

    of_upper: set[str] | None = None
    of_lower: set[str] | None = None
    judged: bool = False
    responds: bool = False
    misses: int = 0


@dataclass
class _ReachedLower:
    """Structures of lower variables that have been examined, and the names that were listed as not reached."""

    examined: set[tuple[str, ...]] = field(default_factory=set)
    listed: set[str] = field(default_factory=set)


_lower = PerProblem(_ReachedLower)
_upper = PerProblem(lambda: defaultdict[tuple[str, ...], _ReachedUpper](_ReachedUpper))
"""By the names of the upper variables."""


_patience: ContextVar[int] = ContextVar("bilevel_reach_patience", default=0)

_PATIENCE = 10
"""Upper steps of a training that may go by before its batches must have reached some upper variable."""


@contextmanager
def batch_by_batch() -> Iterator[None]:
    """Inside, upper variables may be reached by later batches (a variable for each task, labels in some batches)."""
    token = _patience.set(_PATIENCE)
    try:
        yield
    finally:
        _patience.reset(token)


def examine_lower(problem: Problem, name: str, values: object, upper: Params, lower: Params) -> None:
    """Say once which lower variables the graphs of L without the regularizer, or of its outputs, do not reach, and
    whether they begin at tensors that are no variables.

    Nothing is examined in passes without a graph, or within a transform of torch.func.

    Args:
        name: of the method of the Problem that gave `values`.
        lower: the variables of this pass; those that require no gradient are constants in it.

    Raises:
        ValueError: they reach none of them.
    """
    known, names = _lower.of(problem), tuple([name for name, leaf in lower.items() if leaf.requires_grad])
    if names in known.examined or not names or not torch.is_grad_enabled():
        return
    lower = {name: lower[name] for name in names}
    if any(torch.func.debug_unwrap(leaf) is not leaf for leaf in lower.values()):
        return
    leaves = beginnings(tree.tensors_in(values))
    found = named_among(leaves, lower)
    if not found:
        raise ValueError(_reaches_none(name, "lower", lower))
    known.examined.add(names)
    _list_foreign(name, leaves, upper, lower)
    missing = set(lower) - found - known.listed
    known.listed |= missing
    _list(f"{name} does not reach", "lower", missing, lower)


def examine_upper(problem: Problem, loss: Tensor, upper: Params, lower: Params) -> None:
    """Take note of what F reaches.

    Raises:
        ValueError: it reaches none of the lower variables, so that the upper level does not see the lower one.
    """
    found = _reached(problem, upper)
    if found.of_upper is not None and found.judged:
        return
    leaves = beginnings([loss])
    if not named_among(leaves, lower):
        raise ValueError(_reaches_none("upper_objective", "lower", lower))
    if found.of_upper is None:
        _list_foreign("upper_objective", leaves, upper, lower)
    found.of_upper = named_among(leaves, upper)
    _judge_upper(problem, upper)


def _reached(problem: Problem, upper: Params) -> _ReachedUpper:
    return _upper.of(problem)[tuple(upper)]


def examine_cross(problem: Problem, found: set[str], upper: Params) -> None:
    """Take note of the names of the upper variables that L or r reaches.

    Raises:
        ValueError: F reaches none either.
    """
    _reached(problem, upper).of_lower = found
    _judge_upper(problem, upper)


def examine_response(problem: Problem, upper: Params, reaches: Callable[[], bool]) -> None:
    """Ask once for the names of these upper variables whether L or r `reaches` any.

    Raises:
        ValueError: they do not.
    """
    known = _reached(problem, upper)
    if upper and not known.responds:
        if not reaches():
            raise ValueError(_reaches_none("no objective of the lower level", "upper", upper))
        known.responds = True


def cross_examined(problem: Problem, upper: Params) -> bool:
    """Whether `examine_cross` has nothing more to find."""
    found = _reached(problem, upper)
    return found.of_lower is not None and (found.of_upper is None or found.judged)


def _judge_upper(problem: Problem, upper: Params) -> None:
    """Raise where no objective reaches any upper variable; say once which ones none reaches."""
    found = _reached(problem, upper)
    if not upper or found.of_upper is None or found.of_lower is None:
        return
    missing = set(upper) - found.of_upper - found.of_lower
    if len(missing) == len(upper):
        found.of_upper = found.of_lower = None
        found.misses += 1
        if found.misses > _patience.get():
            raise ValueError(_reaches_none("no objective, neither upper nor lower,", "upper", upper))
        return
    if not found.judged:
        found.judged = True
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


def _list_foreign(name: str, leaves: Iterable[Tensor], upper: Params, lower: Params) -> None:
    """Say where a graph begins at parameters of a module that was called directly, or the like."""
    own = {id(leaf) for variables in (upper, lower) for leaf in variables.values()}
    foreign = [leaf for leaf in leaves if id(leaf) not in own]
    if foreign and rank() == 0:
        shapes = [tuple(leaf.shape) for leaf in foreign[:4]]
        logging.getLogger("bilevel").warning(
            "%s depends on %d tensors that require gradients and are no variables of this pass, of shapes %s%s: "
            "constants here. If these are parameters of a module that is called directly, call it by "
            "functional_call(module, lower, args); if they are meant to be constants, requires_grad_(False) says so",
            *(name, len(foreign), shapes, "" if len(foreign) <= 4 else " ..."),
        )


def _shown(names: Iterable[str]) -> str:
    names = list(names)
    return f"{names[:8]}" if len(names) <= 8 else f"{names[:8]} and {len(names) - 8} more"
