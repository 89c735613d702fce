"""Checks of arguments: each raises one sentence that names the argument, what came and what to do."""

import math
from typing import Any

from bilevel.tree import Params


def check_count(argument: str, value: object, *, least: int) -> None:
    """Raise ValueError unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{argument} must be a whole number of at least {least}, got {value!r}")


def check_number(argument: str, value: object, *, positive: bool = False, below: float = math.inf) -> None:
    """Raise ValueError unless `value` is a number in [0, below), in (0, below) where it must be `positive`."""
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value < below
    if not valid or (positive and value == 0.0):
        kind = "a positive number" if positive else "a finite number >= 0"
        limit = "" if below == math.inf else f" and below {below:g}"
        raise ValueError(f"{argument} must be {kind}{limit}, got {value!r}")


def check_kind(argument: str, value: object, kind: type | tuple[type, ...], remedy: str) -> None:
    """Raise TypeError unless `value` is of the `kind`; `remedy` says what to pass."""
    if not isinstance(value, kind):
        given = f"the class {value.__name__}" if isinstance(value, type) else f"{_shown(value)}"
        raise TypeError(f"{argument} must be {remedy}, got {given}")


def same_structure(x: Params, y: Params) -> bool:
    """Whether both have the same names with the same shapes, in any order."""
    return {name: leaf.shape for name, leaf in x.items()} == {name: leaf.shape for name, leaf in y.items()}


def _shown(value: Any) -> str:
    """A short value itself, of others the type."""
    text = repr(value)
    return text if len(text) <= 40 and "\n" not in text else f"a {type(value).__name__}"
