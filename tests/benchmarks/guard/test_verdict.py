"""Intervals of a median against the binomial distribution, and what is said of them."""

from itertools import pairwise
from math import comb

import numpy as np
import pytest

from benchmarks.guard.verdict import LEAST_PAIRS, LEVEL, Change


@pytest.mark.parametrize("count", range(LEAST_PAIRS, 25))
def test_the_interval_is_the_shortest_of_order_statistics_that_holds_the_median(count: int) -> None:
    # Of n values from any continuous distribution at most k lie below its median with probability sum C(n, j) / 2^n.
    outside = 0.0
    for left_out in range(count):
        outside += comb(count, left_out) / 2**count
        if 2.0 * outside > 1.0 - LEVEL:
            break
    ratios = np.random.default_rng(count).permutation(np.arange(1.0, count + 1.0))
    change = Change.of(ratios.tolist())
    assert (change.low, change.high) == (left_out, count + 1 - left_out)
    assert change.median == np.median(ratios)


def test_fewer_pairs_have_no_interval() -> None:
    assert 2.0 * 0.5 ** (LEAST_PAIRS - 1) > 1.0 - LEVEL > 2.0 * 0.5**LEAST_PAIRS
    with pytest.raises(ValueError, match=f"at least {LEAST_PAIRS}, got {LEAST_PAIRS - 1}"):
        Change.of([1.0] * (LEAST_PAIRS - 1))


def test_the_interval_turns_over_with_the_sides() -> None:
    ratios = [1.3, 0.9, 1.1, 2.0, 1.0, 1.2, 0.5]
    one, other = Change.of(ratios), Change.of([1.0 / ratio for ratio in ratios])
    assert (one.low, one.median, one.high) == pytest.approx((1 / other.high, 1 / other.median, 1 / other.low))


@pytest.mark.parametrize(
    ("low", "high", "said", "from_threshold"),
    [
        (1.04, 1.07, "slower by 4.0 to 7.0%", 0.04),
        (0.9, 0.95, "faster by 5.0 to 10.0%", None),
        (0.98, 1.01, "no difference seen (within 2.0%)", None),
        (0.99, 1.03, "no difference seen (within 3.0%)", None),
        (1.0, 1.0, "no difference seen (within 0.0%)", None),
        (2.5, 3.0, "slower by 150.0 to 200.0%", 1.5),
    ],
)
def test_words_and_thresholds(low: float, high: float, said: str, from_threshold: float | None) -> None:
    change = Change((low + high) / 2, low, high)
    assert change.words() == said
    for below, above in pairwise((0.0, 0.039, 0.041, 1.49, 1.51)):
        assert change.is_slower(below) >= change.is_slower(above)
    assert change.is_slower() == (from_threshold is not None)
    if from_threshold is not None:
        assert change.is_slower(from_threshold - 1e-3)
        assert not change.is_slower(from_threshold + 1e-3)
