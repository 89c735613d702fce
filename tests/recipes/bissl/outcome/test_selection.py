"""The rule by which a search chooses, against its recomputation."""

import numpy as np
import pytest

from recipes.bissl.outcome.search.selection import near_best
from recipes.experiment.search.trial_record import Scores


def scores(score: float, loss: float, *, higher: bool = True) -> Scores:
    return Scores(1, "m", higher, score, loss, {"m": score, "loss": loss}, 1, 1.0)


@pytest.mark.parametrize("higher", [True, False])
def test_the_rule_against_its_recomputation(higher: bool) -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        count = int(generator.integers(1, 40))
        # Coarse numbers, so that scores and losses tie; eighths are exact in binary.
        score = generator.integers(0, 32, count) / 8
        losses = generator.integers(1, 5, count) / 4
        numbers = generator.permutation(count)
        trials = zip(numbers.tolist(), score.tolist(), losses.tolist(), strict=True)
        ranked, within = near_best([(n, scores(s, v, higher=higher)) for n, s, v in trials], 0.5)
        below = (score.max() - score) if higher else (score - score.min())
        near = below <= 0.5
        order = np.lexsort((numbers, losses, np.where(near, 0.0, below), ~near))
        assert ranked == numbers[order].tolist()
        assert within == near.sum()


def test_the_tolerance_includes_its_bound() -> None:
    # 100 * 0.996 - 100 * 0.991 is a little above 0.5 in binary.
    made = [(0, scores(100.0 * 996 / 1000, 2.0)), (1, scores(100.0 * 991 / 1000, 1.0)), (2, scores(99.05, 0.5))]
    assert near_best(made, 0.5)[0][0] == 1
    assert near_best(made, 0.4)[0][0] == 0
