"""The alternation's shape."""

from typing import Any

import pytest

from bilevel import AlternatingSchedule


def test_adaptation_counts_alternations_from_one_and_includes_the_last() -> None:
    schedule = AlternatingSchedule(500, 20, 8, 100, 0.1, {"x": "y"})
    assert [t for t in range(1, 501) if schedule.adapts(t)] == [100, 200, 300, 400, 500]
    assert all(AlternatingSchedule(3, 1, 1, 1, 0.5, {"x": "y"}).adapts(t) for t in (1, 2, 3))
    assert not any(AlternatingSchedule(3, 1, 1).adapts(t) for t in (1, 2, 3))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("alternations", 0), ("alternations", 2.0), ("alternations", True)),
        *(("lower_steps", -1), ("upper_steps", -1), ("upper_steps", "8")),
        *(("adaptation_every", 0), ("adaptation_strength", 1.5), ("adaptation_strength", float("nan"))),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    options: dict[str, Any] = {"alternations": 3, "lower_steps": 2, "upper_steps": 1, name: value}
    with pytest.raises(ValueError, match=f"AlternatingSchedule: {name} must"):
        AlternatingSchedule(**options)


def test_an_adaptation_needs_pairs_that_are_there() -> None:
    with pytest.raises(ValueError, match="adaptation_pairs is empty"):
        AlternatingSchedule(3, 1, 1, adaptation_every=1)


def test_a_level_may_rest() -> None:
    assert AlternatingSchedule(1, 0, 0).lower_steps == 0
