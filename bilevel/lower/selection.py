"""Which lower variables respond to the upper ones, and what is added to the system for them."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from bilevel.checks import check_number
from bilevel.problem import Problem
from bilevel.tree import Params

Tikhonov = float | Mapping[str, float]
"""One number, or one per lower name."""
Selection = Callable[[str], bool] | Iterable[str]
"""Names, or a predicate on names."""


def check_selection(owner: str, implicit: Selection | None) -> Selection | None:
    """`implicit` as a predicate or a tuple of names, which can be gone through more than once.

    Raises:
        TypeError: a bare string, or neither names nor a predicate.
        ValueError: no name.
    """
    if implicit is None or (callable(implicit) and not isinstance(implicit, type)):
        return implicit
    names = tuple(implicit) if isinstance(implicit, Iterable) and not isinstance(implicit, str) else None
    if names is None or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{owner}: implicit must be names of lower variables or a predicate on names, got {implicit!r}")
    if not names:
        raise ValueError(f"{owner}: implicit names no lower variable; leave it out for the Problem's choice")
    return names


def matching(implicit: Selection, lower: Params) -> tuple[str, ...]:
    """Names of `lower` that `implicit` selects, in the order of `lower`."""
    if isinstance(implicit, str):
        raise TypeError(
            f"implicit must be a sequence of names or a predicate, got the string {implicit!r}; pass [{implicit!r}]"
        )
    if callable(implicit):
        return tuple(name for name in lower if implicit(name))
    wanted = list(implicit)
    unknown = [name for name in wanted if name not in lower]
    if unknown:
        raise ValueError(f"implicit names {unknown}, which are not lower variables; there are {list(lower)}")
    return tuple(name for name in lower if name in wanted)


def selected(problem: Problem, lower: Params, implicit: Selection | None) -> tuple[str, ...]:
    """Names of the implicit variables, the Problem's where `implicit` is None; raises if there are none."""
    names = matching(problem.implicit if implicit is None else implicit, lower)
    if not names:
        raise ValueError(f"implicit selects no lower variable; it must match at least one of {list(lower)}")
    return names


def check_tikhonov(tikhonov: Tikhonov) -> None:
    """Raise ValueError unless this is a finite number >= 0, or such numbers under names."""
    for name, value in tikhonov.items() if isinstance(tikhonov, Mapping) else ():
        check_number(f"tikhonov[{name!r}]", value)
    if not isinstance(tikhonov, Mapping):
        check_number("tikhonov", tikhonov)


def check_tikhonov_names(tikhonov: Tikhonov, names: Sequence[str]) -> None:
    """Raise ValueError where a term is for something that is not an implicit lower variable."""
    unknown = sorted(set(tikhonov) - set(names)) if isinstance(tikhonov, Mapping) else []
    if unknown:
        raise ValueError(f"tikhonov names {unknown}, which are not implicit lower variables; there are {list(names)}")
