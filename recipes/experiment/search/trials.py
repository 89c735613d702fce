"""The trials of a search: values of named fields, which the trial's number and the search's seed alone decide."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bilevel.training import derive_seed


@dataclass(frozen=True)
class Trial:
    """One choice of values.

    Attributes:
        number: from 0.
        values: field -> value.
    """

    number: int
    values: Mapping[str, float]


class Distribution(ABC):
    """What values of a field are drawn from."""

    @abstractmethod
    def quantile(self, u: float) -> float:
        """The value below which a share u of all draws lies, 0 <= u < 1."""


@dataclass(frozen=True)
class LogUniform(Distribution):
    r"""Uniform on a logarithmic scale: :math:`a (b / a)^u` with u uniform in [0, 1).

    Raises:
        ValueError: not 0 < low <= high.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (0 < self.low <= self.high < math.inf):
            raise ValueError(f"needs 0 < LOW <= HIGH, got {self.low:g} {self.high:g}")

    def quantile(self, u: float) -> float:
        return min(self.low * (self.high / self.low) ** u, self.high)


def title(field: str) -> str:
    """A field's name in words."""
    return field.replace("_", " ")


def draw(distributions: Mapping[str, Distribution], count: int, seed: int) -> list[Trial]:
    """`count` trials, each field drawn independently from its distribution.

    A value is a function of (seed, number, field), by SHA-256: the trials do not depend on who draws them, in which
    order, or on how many there are. A field's stream is named by its title.
    """
    return [
        Trial(
            number,
            {
                field: distribution.quantile(derive_seed(seed, "search", number, title(field)) / 2**63)
                for field, distribution in distributions.items()
            },
        )
        for number in range(count)
    ]


def grid(values: Mapping[str, Sequence[float]]) -> list[Trial]:
    """Every combination of the fields' values, the last field's changing fastest."""
    combinations = itertools.product(*values.values())
    return [Trial(number, dict(zip(values, chosen, strict=True))) for number, chosen in enumerate(combinations)]
