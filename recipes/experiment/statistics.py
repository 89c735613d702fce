"""Means, confidence intervals and tests over seeds.

What a handful of numbers cannot tell (the spread of one value, a test without spread) is None, never NaN or zero.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Comparison:
    """The difference of two means.

    Attributes:
        difference: Mean of `a` minus mean of `b`.
        ci95: Two-sided t interval of the difference at 95%, or at the level that was asked for; None if it is
            undefined.
        test: The test and, where there is no p-value, the reason.
        p_value: Two-sided, of the hypothesis that the difference is 0; None if it is undefined.
    """

    difference: float
    ci95: tuple[float, float] | None
    test: str
    p_value: float | None


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (divisor n - 1), which is None for a single value.

    Raises:
        ValueError: `values` is empty or holds something that is not a finite number.
    """
    x = _finite("values", values)
    return float(x.mean()), float(x.std(ddof=1)) if len(x) > 1 else None


def paired(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Comparison:
    """Student's paired test: whether ``d_i = a_i - b_i`` has mean 0.

    With n pairs, mean m and sample standard deviation s of d::

        t = m sqrt(n) / s,    interval = m -+ q s / sqrt(n),    q the (1 + level)/2 quantile of Student's t with n - 1
        df

    Args:
        a: One value per seed.
        b: The values of the same seeds, in the same order.
        level: Confidence level of the interval, between 0 and 1.

    Raises:
        ValueError: The lengths differ, a value is not finite, or `level` is outside its range.
    """
    x, y = _finite("a", a), _finite("b", b)
    _check_level(level)
    if len(x) != len(y):
        raise ValueError(f"a and b must hold one value per seed each, got {len(x)} and {len(y)} values")
    d, n = x - y, len(x)
    name = "paired t"
    if n < 2:
        return Comparison(float(d.mean()), None, f"{name} (undefined: one pair)", None)
    s = d.std(ddof=1)
    if s <= _rounding(x, y):
        return Comparison(float(d.mean()), None, f"{name} (undefined: all differences are equal)", None)
    return _t_comparison(float(d.mean()), float(s / math.sqrt(n)), n - 1, name, level)


def welch(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Comparison:
    """Welch's test: whether two independent samples, of any two variances, have the same mean.

    With ``u = s_a^2 / n_a`` and ``w = s_b^2 / n_b``::

        t = (mean a - mean b) / sqrt(u + w),    df = (u + w)^2 / (u^2 / (n_a - 1) + w^2 / (n_b - 1))

    and the interval is the difference -+ q sqrt(u + w), q the (1 + level)/2 quantile of Student's t with df.

    Args:
        a: Values of one sample.
        b: Values of the other.
        level: Confidence level of the interval, between 0 and 1.

    Raises:
        ValueError: A sample is empty or not finite, or `level` is outside its range.
    """
    x, y = _finite("a", a), _finite("b", b)
    _check_level(level)
    difference = float(x.mean() - y.mean())
    name = "welch"
    if min(len(x), len(y)) < 2:
        return Comparison(difference, None, f"{name} (undefined: a single value has no spread)", None)
    if max(x.std(ddof=1), y.std(ddof=1)) <= _rounding(x, y):
        return Comparison(difference, None, f"{name} (undefined: neither sample varies)", None)
    u, w = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
    freedom = (u + w) ** 2 / (u**2 / (len(x) - 1) + w**2 / (len(y) - 1))
    return _t_comparison(difference, math.sqrt(u + w), float(freedom), name, level)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P-values adjusted for being one of several, in the order given; None stays None and does not count as a test.

    With the m values in ascending order, the k-th (from 1) becomes ``max_{j <= k} min(1, (m - j + 1) p_(j))``.

    Raises:
        ValueError: A value is outside [0, 1].

    Source: Holm, "A Simple Sequentially Rejective Multiple Test Procedure" (1979).
    """
    tests = [(p, index) for index, p in enumerate(p_values) if p is not None]
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(sorted(tests)):
        if not 0 <= p <= 1:
            raise ValueError(f"p_values must lie in [0, 1], got {p!r}")
        largest = max(largest, min(1.0, (len(tests) - rank) * p))
        adjusted[index] = largest
    return adjusted


def _t_comparison(difference: float, error: float, freedom: float, test: str, level: float) -> Comparison:
    """Interval and two-sided p-value from a difference and its standard error."""
    half = float(stats.t.ppf((1 + level) / 2, freedom)) * error
    p_value = float(2 * stats.t.sf(abs(difference) / error, freedom))
    return Comparison(difference, (difference - half, difference + half), test, p_value)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level!r}")


def _finite(name: str, values: Sequence[float]) -> np.ndarray:
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or len(x) == 0 or not np.isfinite(x).all():
        raise ValueError(f"{name} must be a non-empty list of finite numbers, got {list(values)!r}")
    return x


def _rounding(x: np.ndarray, y: np.ndarray) -> float:
    """The spread that rounding alone gives to equal differences."""
    return 8 * np.finfo(float).eps * float(max(np.abs(x).max(), np.abs(y).max()))
