"""Records of trials on disk, and what is refused as one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recipes.experiment.errors import ConfigError
from recipes.experiment.search.trial_record import Scores, TrialRecord, read_record, select
from recipes.experiment.search.trials import Trial

TRIAL = Trial(7, {"rate": 0.1, "decay_of_weights": 0.02})
SCORES = Scores(3, "top", True, 61.5, 0.25, {"top": 61.5, "loss": 0.25, "other": None}, 40, 1.5)


@pytest.mark.parametrize("record", [TrialRecord(TRIAL, SCORES), TrialRecord(TRIAL, message="loss nan")])
def test_a_record_is_a_flat_object_and_comes_back(tmp_path: Path, record: TrialRecord) -> None:
    content = record.to_json()
    assert list(content)[:4] == ["trial", "rate", "decay_of_weights", "status"]
    assert content["status"] == ("diverged" if record.message else "finished")
    assert content["score"] == (None if record.message else 61.5)
    path = tmp_path / "007.json"
    path.write_text(json.dumps(content))
    assert read_record(path, TRIAL) == record


def test_records_are_told_in_a_line() -> None:
    values = "007: rate 0.1, decay of weights 0.02: "
    assert TrialRecord(TRIAL, SCORES).describe() == values + "top 61.5, loss 0.25 at epoch 3"
    assert TrialRecord(TRIAL, message="loss nan").describe() == values + "diverged (loss nan)"


@pytest.mark.parametrize("content", ["{", "[]", "3", "{}", '{"trial": 7, "rate": 0.1}'])
def test_anything_else_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "007.json").write_text(content)
    with pytest.raises(ConfigError, match=r"007.json is no record of a trial .* delete the file to repeat"):
        read_record(tmp_path / "007.json", TRIAL)


@pytest.mark.parametrize("change", [{"trial": 8}, {"rate": 0.2}, {"decay_of_weights": 0.0}])
def test_a_record_of_other_values_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "007.json").write_text(json.dumps({**TrialRecord(TRIAL, SCORES).to_json(), **change}))
    with pytest.raises(ConfigError, match=r"007.json is of other values than trial 7"):
        read_record(tmp_path / "007.json", TRIAL)


def test_the_rule_ranks_what_finished() -> None:
    records = [TrialRecord(Trial(n, {}), replace(SCORES, score=float(n))) for n in range(4)]
    records[2] = TrialRecord(Trial(2, {}), message="x")

    def highest(finished: Any) -> tuple[list[int], int]:
        return sorted((number for number, _ in finished), reverse=True), 1

    chosen = select(records, highest)
    assert [record.trial.number for record in chosen.ranked] == [3, 1, 0]
    assert (chosen.winner.trial.number, chosen.within, chosen.diverged) == (3, 1, (2,))
    with pytest.raises(ConfigError, match="none of 1 trials finished"):
        select(records[2:3], highest)
    other = TrialRecord(Trial(9, {}), replace(SCORES, metric="loss"))
    with pytest.raises(ConfigError, match=r"scored by different metrics \(loss, top\)"):
        select([*records, other], highest)
