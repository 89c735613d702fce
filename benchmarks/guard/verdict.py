"""What the ratios of pairs say about a slow-down."""

from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

LEVEL = 0.95
LEAST_PAIRS = 6
"""Below, even the whole range of the ratios holds their median with a probability of less than `LEVEL`."""


@dataclass(frozen=True)
class Change:
    """The median of new over old with its interval.

    Attributes:
        median: over the pairs.
        low, high: the shortest interval of order statistics that holds the true median with a probability of at least
            `LEVEL`, whatever the distribution: the inverted sign test.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> "Change":
        """That of at least `LEAST_PAIRS` ratios."""
        if len(ratios) < LEAST_PAIRS:
            raise ValueError(f"ratios must be at least {LEAST_PAIRS}, got {len(ratios)}")
        test = stats.quantile_test(ratios, q=1, p=0.5)
        interval = test.confidence_interval(LEVEL)
        median = float(stats.scoreatpercentile(ratios, 50))
        return cls(median, float(interval.low), float(interval.high))

    def is_slower(self, threshold: float = 0.0) -> bool:
        """Whether a slow-down by more than this share is certain."""
        return self.low > 1.0 + threshold

    def words(self) -> str:
        """In per cent of the old time."""
        low, high = 100.0 * (self.low - 1.0), 100.0 * (self.high - 1.0)
        if low > 0.0:
            return f"slower by {low:.1f} to {high:.1f}%"
        if high < 0.0:
            return f"faster by {-high:.1f} to {-low:.1f}%"
        return f"no difference seen (within {max(abs(low), abs(high)):.1f}%)"

    def record(self) -> dict[str, float]:
        """For the JSON file."""
        return {"median": self.median, "low": self.low, "high": self.high}
