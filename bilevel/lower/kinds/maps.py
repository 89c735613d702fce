"""The abstract proximal map, and one map for each variable."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from bilevel.checks import check_kind, check_number
from bilevel.tree import Params

Parameter = float | Tensor | Mapping[str, float | Tensor]
"""Of a map: a number, a tensor that broadcasts against each variable, or one of these for each variable by name."""


class ProximalMap(ABC):
    r"""The proximal map of a function h, or the projection onto a set (h = 0 on it, infinite outside):

    .. math:: \operatorname{prox}_{\eta h}(z) = \arg\min_y \; h(y) + \frac{1}{2 \eta} \|y - z\|^2.

    A map is a value made of its parameters; those that are tensors are differentiated. A subclass writes `__call__`
    with torch's operations, so that its derivative is that of the piece z lies on (0 or 1 for a bound, no average of
    both at a kink), and says in `distances` how far z is from the other pieces.

    Attributes:
        separable: whether what comes of a variable depends on that variable alone.
    """

    separable: bool = True

    @abstractmethod
    def __call__(self, point: Params, step: float) -> Params:
        """prox at z = `point` with eta = `step`: a tensor of its variable's shape under each name."""

    def distances(self, point: Params, step: float) -> Params:
        """Signed distances of z from the kinks of the map, of any shape for each variable: the signs tell which piece z
        is on (the active set, the support), and the least modulus how near another one is. A variable whose part of the
        map is smooth is left out; the default leaves out all."""
        return {}


@final
class ByName(ProximalMap):
    """A map for each of some variables; the others are left as they are.

    Args:
        maps: variable -> its map, which sees that variable alone.

    Raises:
        TypeError: something else than maps under names.
        ValueError: no map; at a call, a name that is not there.
    """

    def __init__(self, maps: Mapping[str, ProximalMap]) -> None:
        check_kind("ByName: maps", maps, Mapping, "a mapping of variables to their maps, such as {'w': L1(0.1)}")
        for name, one in maps.items():
            check_kind(f"ByName: maps[{name!r}]", one, ProximalMap, "a ProximalMap such as L1(0.1)")
        if not maps:
            raise ValueError("ByName: maps is empty; give at least one variable a map")
        self.maps = dict(maps)

    def __call__(self, point: Params, step: float) -> Params:
        self._check(point)
        moved = {name: one({name: point[name]}, step)[name] for name, one in self.maps.items()}
        return {name: moved.get(name, leaf) for name, leaf in point.items()}

    def distances(self, point: Params, step: float) -> Params:
        self._check(point)
        found: Params = {}
        for name, one in self.maps.items():
            found |= one.distances({name: point[name]}, step)
        return found

    def _check(self, point: Params) -> None:
        unknown = sorted(set(self.maps) - set(point))
        if unknown:
            raise ValueError(f"ByName: maps names {unknown}, which are not lower variables; there are {list(point)}")


def check_parameter(owner: str, value: object, *, negative: bool = False) -> None:
    """Raise TypeError for what is no parameter, ValueError for a number that is a NaN or, unless allowed, negative or
    infinite. Tensors are not read: that would wait for the device."""
    parts = value if isinstance(value, Mapping) else {None: value}
    for name, part in parts.items():
        where = owner if name is None else f"{owner}[{name!r}]"
        if isinstance(part, Tensor):
            continue
        if isinstance(part, bool) or not isinstance(part, (int, float)):
            raise TypeError(f"{where} must be a number or a tensor, got {type(part).__name__}")
        if not negative:
            check_number(where, part)
        elif part != part:
            raise ValueError(f"{where} must be a number, got nan")


def of_name(value: Parameter, name: str, leaf: Tensor) -> Tensor | None:
    """A parameter for one variable, in its precision; None where the variable has none."""
    part = value.get(name) if isinstance(value, Mapping) else value
    if part is None:
        return None
    return part.to(leaf) if isinstance(part, Tensor) else torch.tensor(part, dtype=leaf.dtype, device=leaf.device)
