"""The rounds of the evidence: what each compares, how far its differences were expected to spread, what it searches."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from scipy import stats

from recipes.experiment.configuration import read_config_file

ROOT = Path(__file__).resolve().parents[2]

Pair = tuple[str, str]


@dataclass(frozen=True)
class Search:
    """How the upper level's learning rate of each arm that has one is chosen, before the seeds of the result are run.

    Attributes:
        arms: those that are searched; each tries every rate.
        rates: candidates for `bissl.upper_lr`, in rising order.
        seeds: first seed and number of seeds of the whole pipelines; none of the result's.
        val_per_class: images a class to validate on, in the search alone.
    """

    arms: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, int]
    val_per_class: int


@dataclass(frozen=True)
class Round:
    """One run of all arms over its seeds.

    Attributes:
        name: names its configuration beside this file, its figures and the tables of the page.
        family: the pairs of arms that are compared, (a, b) for a minus b.
        spreads: the standard deviation of the paired differences of each (points of top-1) that the design is
            calculated with, known before the round.
        search: how rates are chosen first; None where the configuration has them.
    """

    name: str
    family: tuple[Pair, ...]
    spreads: Mapping[Pair, float] = field(repr=False)
    search: Search | None = None

    @property
    def config(self) -> Path:
        return Path(__file__).with_name(f"{self.name}.toml")

    @property
    def figures(self) -> Path:
        return ROOT / "benchmarks" / "results" / f"evidence_{self.name}.json"

    @property
    def seeds(self) -> int:
        return int(read_config_file(self.config)["pipeline_seeds"])

    @property
    def strictest_level(self) -> float:
        """The level that the smallest p-value of the family is held to by Holm's correction."""
        return 0.05 / len(self.family)


def smallest_effect(pairs: int, spread: float, *, power: float = 0.8, level: float = 0.05) -> float:
    """(t_{1 - level/2} + t_{power}) spread / sqrt(pairs), with pairs - 1 degrees of freedom."""
    quantiles = stats.t.ppf(1.0 - level / 2.0, pairs - 1) + stats.t.ppf(power, pairs - 1)
    return float(quantiles * spread / math.sqrt(pairs))


_FIRST_FAMILY = (
    ("bissl", "identity"),
    ("bissl-low-damping", "identity"),
    ("identity", "restart"),
    ("restart", "baseline"),
    ("bissl", "baseline"),
    ("bissl", "restart"),
    ("baseline", "scratch"),
)

_INDEPENDENT = math.sqrt(2.0) * 1.6
"""Arms of independent noise, each with the deviation of about 1.6 of three fine-tunings of the preset `images`."""

_SOLVE, _UPPER, _RESTART, _METHOD = 0.71, 0.85, 1.40, 1.48
"""What the first round found for bissl - identity, identity - restart, restart - baseline and bissl - baseline."""

FIRST = Round("first", _FIRST_FAMILY, dict.fromkeys(_FIRST_FAMILY, _INDEPENDENT))

SECOND = Round(
    "second",
    (
        ("bissl", "identity-gamma-0.01"),
        ("bissl-gamma-1", "identity-gamma-1"),
        ("bissl-gamma-1", "bissl"),
        ("identity-gamma-1", "identity-gamma-0.01"),
        ("identity-gamma-0.01", "restart"),
        ("restart", "baseline"),
        ("bissl", "baseline"),
        ("bissl-gamma-1", "baseline"),
    ),
    {
        ("bissl", "identity-gamma-0.01"): _SOLVE,
        ("bissl-gamma-1", "identity-gamma-1"): _SOLVE,
        ("bissl-gamma-1", "bissl"): _SOLVE,
        ("identity-gamma-1", "identity-gamma-0.01"): _SOLVE,
        ("identity-gamma-0.01", "restart"): _UPPER,
        ("restart", "baseline"): _RESTART,
        ("bissl", "baseline"): _METHOD,
        ("bissl-gamma-1", "baseline"): _METHOD,
    },
    Search(
        arms=("bissl", "bissl-gamma-1", "identity-gamma-0.01", "identity-gamma-1"),
        rates=(0.01, 0.03, 0.1),
        seeds=(100, 2),
        val_per_class=100,
    ),
)

ROUNDS = {each.name: each for each in (FIRST, SECOND)}
