"""Means, t-tests, intervals and Holm's correction over the values of a few seeds; shares; how well scores rank.

What a handful of numbers cannot tell (the spread of one value, a test without spread) is None, never NaN or zero.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Comparison:
    """The difference of two means.

    Attributes:
        difference: Mean of `a` minus mean of `b`.
        ci95: Two-sided t interval of the difference at 95%; None if it is undefined.
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


def over_repeats(figures: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, Any]]:
    """Of each figure of several repeats "mean", "std" and, in their order, "per_seed"; None where one has none."""
    found = {}
    for name in figures[0]:
        values = [one[name] for one in figures]
        known = [value for value in values if value is not None]
        mean, std = mean_std(known) if len(known) == len(values) else (None, None)
        found[name] = {"mean": mean, "std": std, "per_seed": values}
    return found


def paired(a: Sequence[float], b: Sequence[float]) -> Comparison:
    """Student's paired test: whether ``d_i = a_i - b_i`` has mean 0.

    With n pairs, mean m and sample standard deviation s of d::

        t = m sqrt(n) / s,    interval = m -+ q s / sqrt(n),    q the 0.975 quantile of Student's t with n - 1 df

    Args:
        a: One value per seed.
        b: The values of the same seeds, in the same order.

    Raises:
        ValueError: The lengths differ, or a value is not finite.
    """
    from scipy import stats

    x, y = _finite("a", a), _finite("b", b)
    if len(x) != len(y):
        raise ValueError(f"a and b must hold one value per seed each, got {len(x)} and {len(y)} values")
    difference, name = float((x - y).mean()), "paired t"
    if len(x) < 2:
        return Comparison(difference, None, f"{name} (undefined: one pair)", None)
    if (x - y).std(ddof=1) <= _rounding(x, y):
        return Comparison(difference, None, f"{name} (undefined: all differences are equal)", None)
    return _comparison(difference, name, stats.ttest_rel(x, y))


def welch(a: Sequence[float], b: Sequence[float]) -> Comparison:
    """Welch's test: whether two independent samples, of any two variances, have the same mean.

    With ``u = s_a^2 / n_a`` and ``w = s_b^2 / n_b``::

        t = (mean a - mean b) / sqrt(u + w),    df = (u + w)^2 / (u^2 / (n_a - 1) + w^2 / (n_b - 1))

    and the interval is the difference -+ q sqrt(u + w), q the 0.975 quantile of Student's t with df.

    Args:
        a: Values of one sample.
        b: Values of the other.

    Raises:
        ValueError: A sample is empty or not finite.
    """
    from scipy import stats

    x, y = _finite("a", a), _finite("b", b)
    difference, name = float(x.mean() - y.mean()), "welch"
    if min(len(x), len(y)) < 2:
        return Comparison(difference, None, f"{name} (undefined: a single value has no spread)", None)
    if max(x.std(ddof=1), y.std(ddof=1)) <= _rounding(x, y):
        return Comparison(difference, None, f"{name} (undefined: neither sample varies)", None)
    with warnings.catch_warnings():
        # SciPy warns of a sample that does not vary, which is nothing to warn of where the other one does.
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)
        test = stats.ttest_ind(x, y, equal_var=False)
    return _comparison(difference, name, test)


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


def area_under_curve(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """Chance that a positive one scores higher than another one, a tie counting one half; None without either kind.

    With ranks r of all n scores (mean ranks for ties) and p positive ones, ``(sum r - p (p + 1) / 2) / (p (n - p))``.

    Args:
        scores: float [n]; positive: bool [n].
    """
    from scipy import stats

    count, others = int(positive.sum()), int((~positive).sum())
    if not count or not others:
        return None
    ranks = stats.rankdata(scores)
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * others))


def areas_apart(a: np.ndarray, b: np.ndarray, positive: np.ndarray) -> tuple[float, float]:
    """The area under the curve of scores `a` minus that of `b`, of the same samples, and its standard error.

    With u_i the share of the n others that positive sample i outranks (a tie counts one half), and v_j the share of the
    p positive ones that outrank the other sample j, each by a minus by b, the error is ``sqrt(var u / p + var v / n)``.

    Args:
        a, b: float [k]; positive: bool [k], two or more of each kind.

    Source: DeLong, DeLong and Clarke-Pearson, "Comparing the Areas under Two or More Correlated Receiver Operating
    Characteristic Curves" (1988).
    """
    from scipy import stats

    def placed(scores: np.ndarray, these: np.ndarray) -> np.ndarray:
        """Of each of these samples the share of all others that score lower."""
        below = stats.rankdata(scores)[these] - stats.rankdata(scores[these])
        return below / (~these).sum()

    u, v = (placed(a, these) - placed(b, these) for these in (positive, ~positive))
    return float(u.mean()), float(np.sqrt(u.var(ddof=1) / len(u) + v.var(ddof=1) / len(v)))


def share_interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's interval at 95% of a chance, by the share of `count` independent trials that came out so."""
    from scipy import stats

    interval = stats.binomtest(round(share * count), count).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def precision_at_recall(scores: np.ndarray, positive: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """Precision among the highest scores, of as many as hold each share in `recalls` of the positive ones, float [k].

    Args:
        scores: float [n]; positive: bool [n], some of them true; recalls: in (0, 1].
    """
    found = np.cumsum(positive[np.argsort(-scores, kind="stable")])
    needed = np.ceil(recalls * found[-1] - 1e-9)
    places = np.searchsorted(found, needed)
    return found[places] / (places + 1)


def _comparison(difference: float, name: str, test: Any) -> Comparison:
    """What SciPy's result of a t-test says."""
    interval = test.confidence_interval(0.95)
    return Comparison(difference, (float(interval.low), float(interval.high)), name, float(test.pvalue))


def _finite(name: str, values: Sequence[float]) -> np.ndarray:
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or len(x) == 0 or not np.isfinite(x).all():
        raise ValueError(f"{name} must be a non-empty list of finite numbers, got {list(values)!r}")
    return x


def _rounding(x: np.ndarray, y: np.ndarray) -> float:
    """The spread that rounding alone gives to equal differences."""
    return 8 * np.finfo(float).eps * float(max(np.abs(x).max(), np.abs(y).max()))
