"""What a search tries: distributions of named fields, and trials that are drawn from them or laid on a grid.

Distributions are Optuna's, so that a study can store them and its samplers draw from them.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bilevel.training import derive_seed

from ..errors import ConfigError
from .storage import load_optuna

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Space = Mapping[str, "BaseDistribution"]
"""Field -> what its values are drawn from. Names of nested fields are joined by dots."""


@dataclass(frozen=True)
class Trial:
    """One choice of values.

    Attributes:
        number: from 0.
        values: field -> value.
    """

    number: int
    values: Mapping[str, Any]


def log_uniform(low: float, high: float) -> BaseDistribution:
    r"""Uniform on a logarithmic scale: :math:`a (b / a)^u` with u uniform in [0, 1).

    Raises:
        ValueError: not 0 < low <= high.
    """
    if not (0 < low <= high < math.inf):
        raise ValueError(f"needs 0 < LOW <= HIGH, got {low:g} {high:g}")
    return load_optuna().distributions.FloatDistribution(low, high, log=True)


def quantile(distribution: BaseDistribution, u: float) -> Any:
    """The value below which a share u of all draws lies, 0 <= u <= 1; the choices of a set have equal shares."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[min(int(u * len(distribution.choices)), len(distribution.choices) - 1)]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    # Each integer stands for what is rounded to it.
    around = 0.5 if isinstance(distribution, IntDistribution) else 0.0
    low, high = distribution.low - around, distribution.high + around
    value = low * (high / low) ** u if distribution.log else low + (high - low) * u
    if isinstance(distribution, IntDistribution):
        return min(max(round(value), distribution.low), distribution.high)
    return min(value, high)


def probes(distribution: BaseDistribution) -> list[Any]:
    """Values by which to see whether a field takes what may be drawn: every choice, or both ends and one between."""
    from optuna.distributions import CategoricalDistribution

    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    return [quantile(distribution, u) for u in (0.0, 1.0, 1 / math.pi)]


def draw(space: Space, count: int, seed: int) -> list[Trial]:
    """`count` trials, each field drawn independently from its distribution.

    A value is a function of (seed, number, field), by SHA-256: the trials do not depend on who draws them, in which
    order, or on how many there are. A field's stream is named by its words.
    """
    return [
        Trial(
            number,
            {
                field: quantile(distribution, derive_seed(seed, "search", number, field.replace("_", " ")) / 2**63)
                for field, distribution in space.items()
            },
        )
        for number in range(count)
    ]


def grid(values: Mapping[str, Sequence[float]]) -> tuple[dict[str, BaseDistribution], list[Trial]]:
    """Every combination of the fields' values, the last field's changing fastest, and the space that they lie in."""
    combinations = itertools.product(*values.values())
    trials = [Trial(number, dict(zip(values, chosen, strict=True))) for number, chosen in enumerate(combinations)]
    return {field: log_uniform(min(given), max(given)) for field, given in values.items()}, trials


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of fields whose names are joined by dots, as tables within tables."""
    found: dict[str, Any] = {}
    for field, value in values.items():
        *tables, name = field.split(".")
        table = found
        for part in tables:
            table = table.setdefault(part, {})
        table[name] = value
    return found


FORMS = "log:LOW:HIGH, uniform:LOW:HIGH, int:LOW:HIGH, logint:LOW:HIGH or choice:A,B,..."


def parse_space(options: Iterable[str]) -> dict[str, BaseDistribution]:
    """The space that options ``FIELD=FORM`` describe, with forms as in `FORMS`; a choice is JSON, or else text.

    Raises:
        ConfigError: naming the option, what is wrong with it, and the forms.
    """
    space: dict[str, BaseDistribution] = {}
    for option in options:
        field, equals, form = option.partition("=")
        field = field.replace("-", "_")
        if not equals or not all(field.split(".")):
            raise ConfigError(f"--space: needs FIELD=FORM, such as training.rate=log:1e-4:1e-1, got {option!r}")
        if field in space:
            raise ConfigError(f"--space: {field} is given twice; give it once")
        try:
            space[field] = _distribution(form)
        except ValueError as error:
            raise ConfigError(f"--space {option}: {error}; forms are {FORMS}") from error
    for field in space:
        inner = next((other for other in space if other.startswith(f"{field}.")), None)
        if inner is not None:
            raise ConfigError(f"--space: {inner} lies within {field}; leave out one of the two")
    return space


def _distribution(form: str) -> BaseDistribution:
    kinds = load_optuna().distributions
    kind, _, rest = form.partition(":")
    if kind == "choice":
        choices = [_choice(text) for text in rest.split(",")]
        if not rest or len(set(choices)) < len(choices):
            raise ValueError("needs choices, each once")
        return kinds.CategoricalDistribution(choices)
    ends = rest.split(":")
    if kind not in ("log", "uniform", "int", "logint") or len(ends) != 2:
        raise ValueError("is of no known form")
    if kind in ("int", "logint"):
        low, high = (int(end) for end in ends)
        if not low <= high or max(abs(low), abs(high)) >= 2**53 or (kind == "logint" and low < 1):
            raise ValueError(f"needs {'1 <= ' if kind == 'logint' else ''}LOW <= HIGH, got {low} {high}")
        return kinds.IntDistribution(low, high, log=kind == "logint")
    low, high = (float(end) for end in ends)
    if kind == "log":
        return log_uniform(low, high)
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"needs LOW <= HIGH, got {low:g} {high:g}")
    return kinds.FloatDistribution(low, high)


def _choice(text: str) -> bool | int | float | str | None:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    if isinstance(value, list | dict) or value != value:
        raise ValueError(f"needs choices that are text, numbers, true, false or null, got {text}")
    return value
