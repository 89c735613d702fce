import math
import warnings
from typing import Any

import numpy as np
import pytest
from scipy import stats

from recipes.experiment.statistics import (
    Comparison,
    area_under_curve,
    areas_apart,
    holm,
    mean_std,
    over_repeats,
    paired,
    precision_at_recall,
    share_interval,
    welch,
)

A = [81.2, 80.4, 82.9, 81.0, 83.3, 80.7]
B = [79.9, 80.6, 81.1, 80.2, 81.8, 80.1]


def test_mean_std_of_a_sample() -> None:
    mean, std = mean_std([2, 4, 4, 4, 5, 5, 7, 9])
    assert mean == 5
    assert std == pytest.approx(math.sqrt(32 / 7))
    assert mean_std([3.5]) == (3.5, None)


def check(result: Comparison, test: str, error: Any, freedom: Any) -> None:
    """The textbook's t-test of `result.difference`, with its standard error and degrees of freedom."""
    assert result.test == test
    half = stats.t.ppf(0.975, freedom) * error
    assert result.ci95 == pytest.approx((result.difference - half, result.difference + half), rel=1e-12)
    assert result.p_value == pytest.approx(2 * stats.t.sf(abs(result.difference) / error, freedom), rel=1e-12)


def test_paired_is_the_textbooks() -> None:
    d = np.subtract(A, B)
    result = paired(A, B)
    assert result.difference == pytest.approx(d.mean())
    check(result, "paired t", d.std(ddof=1) / math.sqrt(6), 5)


@pytest.mark.parametrize("b", [B, B[:3]])
def test_welch_is_the_textbooks(b: list[float]) -> None:
    u, w = np.var(A, ddof=1) / 6, np.var(b, ddof=1) / len(b)
    result = welch(A, b)
    assert result.difference == pytest.approx(np.mean(A) - np.mean(b))
    check(result, "welch", math.sqrt(u + w), (u + w) ** 2 / (u**2 / 5 + w**2 / (len(b) - 1)))


def test_welch_with_one_sample_that_does_not_vary_is_a_one_sample_test() -> None:
    expected: Any = stats.ttest_1samp(A, 80.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert welch(A, [80.0, 80.0]).p_value == pytest.approx(expected.pvalue)


def test_swapping_the_samples_changes_the_sign_alone() -> None:
    for test in (paired, welch):
        forth, back = test(A, B), test(B, A)
        assert forth.ci95 is not None
        assert back.difference == pytest.approx(-forth.difference)
        assert back.ci95 == pytest.approx((-forth.ci95[1], -forth.ci95[0]))
        assert back.p_value == pytest.approx(forth.p_value)


def test_what_one_seed_cannot_tell_is_none() -> None:
    assert paired([3.0], [1.0]) == Comparison(2.0, None, "paired t (undefined: one pair)", None)
    assert welch([3.0], [1.0, 2.0]) == Comparison(1.5, None, "welch (undefined: a single value has no spread)", None)


def test_equal_differences_have_no_test_even_when_rounding_spreads_them() -> None:
    a, b = [0.3, 80.1], [0.2, 80.0]
    assert len({x - y for x, y in zip(a, b, strict=True)}) > 1
    result = paired(a, b)
    assert result.difference == pytest.approx(0.1)
    assert (result.ci95, result.p_value) == (None, None)
    assert "equal" in result.test
    assert paired(a, a).p_value is None


def test_welch_without_any_spread_is_undefined() -> None:
    result = welch([50.0, 50.0], [40.0, 40.0])
    assert (result.difference, result.ci95, result.p_value) == (10.0, None, None)
    assert "neither sample varies" in result.test


def test_a_small_spread_is_still_a_spread() -> None:
    result = paired([80.0, 80.0 + 1e-9], [79.0, 79.0])
    assert result.p_value is not None


def test_holm_by_hand() -> None:
    # Ascending, 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1 is 0.04, 0.06, 0.06, 0.04, and the sequence may not fall.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.4, 0.6]) == pytest.approx([0.8, 0.8])
    assert holm([0.7, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_holm_does_not_count_what_was_not_tested() -> None:
    assert holm([None, 0.02, None, 0.5]) == [None, pytest.approx(0.04), None, pytest.approx(0.5)]


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf]])
def test_samples_must_be_finite_numbers(bad: list[float]) -> None:
    for call in (lambda: mean_std(bad), lambda: paired(bad, bad), lambda: welch(A, bad)):
        with pytest.raises(ValueError, match="finite numbers"):
            call()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="6 and 5 values"):
        paired(A, B[:5])
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="p_values"):
            holm([0.5, p])


def test_area_under_curve_is_the_share_of_pairs_in_order() -> None:
    scores, positive = np.array([3.0, 1.0, 2.0, 2.0, 0.0]), np.array([True, False, True, False, False])
    pairs = [(a, b) for a in scores[positive] for b in scores[~positive]]
    expected = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
    assert area_under_curve(scores, positive) == expected == 5.5 / 6
    assert area_under_curve(scores, np.zeros(5, dtype=bool)) is None
    assert area_under_curve(scores, np.ones(5, dtype=bool)) is None


def test_areas_apart_by_hand() -> None:
    positive = np.array([True, True, False, False, False])
    a, b = np.array([5.0, 3.0, 4.0, 2.0, 1.0]), np.array([3.0, 1.0, 2.0, 2.0, 0.0])
    # Shares of others outranked by the positive ones: 1, 2/3 by a and 1, 1/3 by b; and the other way round.
    u = np.array([0.0, 1 / 3])
    v = np.array([-1 / 2 + 1 / 2, 0.0 - 1 / 2, 0.0])
    difference, error = areas_apart(a, b, positive)
    assert difference == pytest.approx(1 / 6)
    assert difference == pytest.approx(area_under_curve(a, positive) - area_under_curve(b, positive))  # type: ignore[operator]
    assert error == pytest.approx(math.sqrt(u.var(ddof=1) / 2 + v.var(ddof=1) / 3))
    assert areas_apart(a, a, positive) == (0.0, 0.0)


def test_the_error_of_areas_apart_is_their_spread_over_samples() -> None:
    draws = np.random.default_rng(0)
    positive = np.arange(200) < 60
    found = []
    for _ in range(400):
        shared = draws.normal(size=200) + positive
        a, b = (shared + draws.normal(size=200) for _ in range(2))
        found.append(areas_apart(a, b, positive))
    differences, errors = np.array(found).T
    assert errors.mean() == pytest.approx(differences.std(ddof=1), rel=0.15)


def test_wilsons_interval_by_its_formula() -> None:
    q, n, share = 1.959963984540054, 40, 0.3
    middle, half = share + q**2 / (2 * n), q * math.sqrt(share * (1 - share) / n + q**2 / (4 * n**2))
    scale = 1 + q**2 / n
    assert share_interval(share, n) == pytest.approx(((middle - half) / scale, (middle + half) / scale))
    assert share_interval(1.0, 10)[1] == 1.0


def test_precision_among_the_highest_that_hold_a_share() -> None:
    scores, positive = np.array([5.0, 4.0, 3.0, 2.0, 1.0]), np.array([True, False, True, True, False])
    found = precision_at_recall(scores, positive, np.array([1 / 3, 0.5, 2 / 3, 1.0]))
    assert found.tolist() == [1.0, 2 / 3, 2 / 3, 3 / 4]


def test_figures_over_repeats() -> None:
    found = over_repeats([{"a": 1.0, "b": None}, {"a": 3.0, "b": 2.0}])
    assert found["a"] == {"mean": 2.0, "std": 2.0**0.5, "per_seed": [1.0, 3.0]}
    assert found["b"] == {"mean": None, "std": None, "per_seed": [None, 2.0]}
