"""Records of trials on disk, and what is refused as one."""

from dataclasses import replace
from typing import Any

import pytest

from recipes.experiment.errors import ConfigError
from recipes.experiment.search.space import Trial
from recipes.experiment.search.trial_record import Scores, TrialRecord, select

TRIAL = Trial(7, {"rate": 0.1, "decay_of_weights": 0.02})
SCORES = Scores(3, "top", True, 61.5, 0.25, {"top": 61.5, "loss": 0.25, "other": None}, 40, 1.5)


def test_a_record_is_a_flat_object() -> None:
    content = TrialRecord(TRIAL, "finished", SCORES).to_json()
    assert list(content)[:4] == ["trial", "rate", "decay_of_weights", "status"]
    assert (content["status"], content["score"], content["message"]) == ("finished", 61.5, None)
    content = TrialRecord(TRIAL, "diverged", message="loss nan").to_json()
    assert (content["status"], content["score"], content["message"]) == ("diverged", None, "loss nan")


def test_records_are_told_in_a_line() -> None:
    values = "007: rate 0.1, decay_of_weights 0.02: "
    assert TrialRecord(TRIAL, "finished", SCORES).describe() == values + "top 61.5, loss 0.25 at epoch 3"
    assert TrialRecord(TRIAL, "diverged", message="loss nan").describe() == values + "diverged (loss nan)"


def test_the_rule_ranks_what_finished() -> None:
    records = [TrialRecord(Trial(n, {}), "finished", replace(SCORES, score=float(n))) for n in range(4)]
    records[2] = TrialRecord(Trial(2, {}), "pruned", message="x")

    def highest(finished: Any) -> tuple[list[int], int]:
        return sorted((number for number, _ in finished), reverse=True), 1

    chosen = select(records, highest)
    assert [record.trial.number for record in chosen.ranked] == [3, 1, 0]
    assert (chosen.winner.trial.number, chosen.within, chosen.others) == (3, 1, (records[2],))
    with pytest.raises(ConfigError, match="none of 1 trials finished"):
        select(records[2:3], highest)
    other = TrialRecord(Trial(9, {}), "finished", replace(SCORES, metric="loss"))
    with pytest.raises(ConfigError, match=r"scored by different metrics \(loss, top\)"):
        select([*records, other], highest)
