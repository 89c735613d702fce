"""Checks of arguments: each raises one sentence that names the argument, what came and what to do."""

import inspect
import math
import os
import warnings
from typing import Any

from bilevel import tree
from bilevel.tree import Params


def check_count(argument: str, value: object, *, least: int, otherwise: str = "") -> None:
    """Raise ValueError unless `value` is a whole number of at least `least`; `otherwise` says what else can be given,
    for the message."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        other = otherwise and f", or {otherwise}"
        raise ValueError(f"{argument} must be a whole number of at least {least}{other}, got {_shown(value)}")


def check_number(
    argument: str,
    value: object,
    *,
    positive: bool = False,
    above: float = 0.0,
    below: float = math.inf,
    most: float = math.inf,
    otherwise: str = "",
) -> None:
    """Raise ValueError unless `value` is a finite number >= 0, below `below` and at most `most`; greater than 0 where
    it must be `positive`, greater than `above` where that is not 0. `otherwise` as in `check_count`."""
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and above <= value < below and value <= most
    if not valid or ((positive or above > 0.0) and value == above):
        kind = "a positive number" if positive else "a finite number >= 0"
        kind = f"a finite number above {above:g}" if above > 0.0 else kind
        limit = "" if below == math.inf else f" and below {below:g}"
        limit += "" if most == math.inf else f" and at most {most:g}"
        other = otherwise and f", or {otherwise}"
        raise ValueError(f"{argument} must be {kind}{limit}{other}, got {_shown(value)}")


def check_kind(argument: str, value: object, kind: type | tuple[type, ...], remedy: str) -> None:
    """Raise TypeError unless `value` is of the `kind`, and no class; `remedy` says what to pass."""
    if isinstance(value, type) or not isinstance(value, kind):
        raise TypeError(f"{argument} must be {remedy}, got {_shown(value)}")


def check_function(argument: str, value: object, remedy: str) -> None:
    """Raise TypeError unless `value` can be called; `remedy` says what to pass."""
    if not callable(value):
        raise TypeError(f"{argument} must be {remedy}, got {_shown(value)}")


def check_path(argument: str, value: object) -> None:
    """Raise TypeError unless `value` is a path."""
    check_kind(argument, value, (str, os.PathLike), "a path")


def check_variables(argument: str, value: object) -> None:
    """Raise unless these are the variables of a level: Params that are all trained and lie apart in memory.

    Raises:
        TypeError: no Params.
        ValueError: some leaves require gradients and others do not, or two share memory.
    """
    tree.check_params(argument, value)
    assert isinstance(value, dict)
    check_trained(argument, value)
    both = tree.overlapping(value.items())
    if both is not None:
        raise ValueError(
            f"{argument}: {both[0]!r} and {both[1]!r} share memory, so that they are no variables of their own; give a "
            "tied tensor once, under one of its names, or give each a memory of its own by clone()"
        )


def check_trained(argument: str, variables: Params) -> None:
    """Raise ValueError where some of a level's variables require gradients and others do not."""
    frozen = [name for name, leaf in variables.items() if not leaf.requires_grad]
    if 0 < len(frozen) < len(variables):
        raise ValueError(
            f"{argument}: {frozen[:3]} ({len(frozen)} of {len(variables)}) have requires_grad=False while the others "
            "require gradients; variables of a level are trained and respond, so leave frozen ones out, as in "
            "{name: p for name, p in module.named_parameters() if p.requires_grad}: functional_call takes what is left "
            "out from the module itself. Or call requires_grad_() on them"
        )


def warn_outside(message: str, category: type[Warning] = UserWarning) -> None:
    """A warning that points to the first line outside this package and torch, which calls it in a backward pass."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in ("bilevel", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def same_structure(x: Params, y: Params) -> bool:
    """Whether both have the same names with the same shapes, in any order."""
    return {name: leaf.shape for name, leaf in x.items()} == {name: leaf.shape for name, leaf in y.items()}


def _shown(value: Any) -> str:
    """A short value itself, of others the type."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    text = repr(value)
    return text if len(text) <= 40 and "\n" not in text else f"a {type(value).__name__}"
