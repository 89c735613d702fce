"""Which ranking is ahead by more than chance, and what a limit by trusted pictures means."""

import numpy as np

from recipes.vision.label_rankings import RECALLS, Ranked, Ranking, ahead_lines, limit_words


def repeat(count: int, seed: int, known: bool = True) -> Ranked:
    """Scores that tell much, something (twice) and nothing of which of `count` labels are wrong."""
    draws = np.random.default_rng(seed)
    wrong = np.arange(count) < count // 4
    some = draws.normal(size=count) + wrong
    scores = {"some": some, "as much": some + 1e-9, "much": some + 2.0 * wrong, "nothing": draws.normal(size=count)}
    return {name: Ranking(one, one > 1.0) for name, one in scores.items()}, wrong if known else None


def test_what_ranks_better_beyond_chance_is_named() -> None:
    rankings, wrong = repeat(400, 0)
    areas = {name: one.figures(wrong)["area_under_curve"] for name, one in rankings.items()}
    (line,) = ahead_lines([(rankings, wrong)], "some")
    assert line == (
        f'here "much" ranks better, by more than chance: area under the curve {areas["much"]:.4f} against '
        f'{areas["some"]:.4f} of "some"'
    )
    assert ahead_lines([(rankings, wrong)], "much") == []
    # Best first.
    assert ahead_lines([(rankings, wrong)], "nothing")[0].startswith('here "much"')
    # Two repeats of the same samples say no more than one.
    assert ahead_lines([(rankings, wrong)] * 2, "some") == [line]


def test_nothing_is_ahead_by_chance_or_where_nobody_knows() -> None:
    rankings, wrong = repeat(400, 0)
    assert wrong is not None
    one_wrong = np.arange(len(wrong)) < 1
    for told in ([(rankings, None)], [(rankings, ~wrong & wrong)], [(rankings, one_wrong)]):
        assert ahead_lines(told, "nothing") == []
    draws = np.random.default_rng(1)
    equal = {name: Ranking(draws.normal(size=40), np.zeros(40, dtype=bool)) for name in ("a", "b")}
    for k in range(2):
        assert ahead_lines([(equal, np.arange(40) % 4 == k)], "a") == []


def test_figures_and_curve() -> None:
    ranking = Ranking(np.array([4.0, 3.0, 2.0, 1.0]), np.array([True, True, False, False]))
    wrong = np.array([True, False, True, False])
    assert ranking.figures(None) == {"suspicious": 2.0}
    assert ranking.figures(wrong) == {"suspicious": 2.0, "area_under_curve": 0.75, "precision": 0.5, "recall": 0.5}
    curve = ranking.curve(wrong)
    assert curve is not None
    assert curve[[0, 49, 99]].tolist() == [1.0, 1.0, 2 / 3]
    assert len(curve) == len(RECALLS)
    assert ranking.curve(None) is None
    assert ranking.curve(np.zeros(4, dtype=bool)) is None


def test_how_exact_a_limit_is() -> None:
    said = limit_words(0.05, 16)
    # sqrt(0.05 * 0.95 / 16) is 0.0545, and 0.05 * 0.95 / 0.01^2 is 475.
    assert "about 5% of the right labels are called suspicious too" in said
    assert "a standard error of 5.4% for 16 of these; 475 would make it 1%" in said
