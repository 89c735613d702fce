"""The rule by which a search chooses, against its recomputation."""

from typing import Any

import numpy as np
import pytest

from recipes.bissl.outcome.search.selection import TrialRecord, select
from recipes.experiment.errors import ConfigError


def record(trial: int, score: float, loss: float, *, higher: bool = True, status: Any = "finished") -> TrialRecord:
    return TrialRecord(trial, 0.1, 0.01, status, 1, "m", higher, score, loss, {"m": score, "loss": loss}, 1, 1.0)


@pytest.mark.parametrize("higher", [True, False])
def test_the_rule_against_its_recomputation(higher: bool) -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        count = int(generator.integers(1, 40))
        # Coarse numbers, so that scores and losses tie; eighths are exact in binary.
        scores = generator.integers(0, 32, count) / 8
        losses = generator.integers(1, 5, count) / 4
        numbers = generator.permutation(count)
        bad = generator.random(count) < 0.2
        bad[0] = False
        made = [
            record(int(n), float(s), float(v), higher=higher, status="diverged" if b else "finished")
            for n, s, v, b in zip(numbers, scores, losses, bad, strict=True)
        ]
        chosen = select(made, 0.5)
        good = ~bad
        below = (scores[good].max() - scores) if higher else (scores - scores[good].min())
        near = good & (below <= 0.5)
        order = np.lexsort((numbers, losses, np.where(near, 0.0, below), ~near))
        assert [r.trial for r in chosen.ranked] == [int(numbers[i]) for i in order if good[i]]
        assert chosen.within == near.sum()
        assert list(chosen.diverged) == sorted(numbers[bad].tolist())


def test_the_tolerance_includes_its_bound() -> None:
    # 100 * 0.996 - 100 * 0.991 is a little above 0.5 in binary.
    made = [record(0, 100.0 * 996 / 1000, 2.0), record(1, 100.0 * 991 / 1000, 1.0), record(2, 99.05, 0.5)]
    assert select(made, 0.5).winner.trial == 1
    assert select(made, 0.4).winner.trial == 0


def test_nothing_is_chosen_where_all_diverged() -> None:
    with pytest.raises(ConfigError, match="none of 1 trials finished"):
        select([record(0, 1.0, 1.0, status="diverged")], 0.5)
