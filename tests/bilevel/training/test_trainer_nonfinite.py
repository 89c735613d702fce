"""Steps of either level that are not finite: nothing changes, what they were made of is saved, some may be left out."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bilevel import AlternatingSchedule
from bilevel.training import Inspect, NonFiniteError
from tests.support.two_heads import LOWER_BATCHES, implicit, make


@pytest.mark.parametrize("level", ["lower", "upper"])
def test_a_trainer_skips_and_saves(level: str, tmp_path: Path) -> None:
    spoilt = (LOWER_BATCHES[1][0], torch.full((5,), math.nan, dtype=torch.float64))
    data: dict[str, Any] = {"lower_data": [LOWER_BATCHES[0], spoilt, LOWER_BATCHES[2]]}
    if level == "upper":
        bad = torch.full((3,), math.nan, dtype=torch.float64)
        data = {"upper_data": [torch.ones(3, dtype=torch.float64), bad]}
    options: dict[str, Any] = {
        "schedule": AlternatingSchedule(1, 3, 2),
        "method": implicit(hessian_batches=1),
        "on_failure": "ignore",
        **data,
    }
    trainer = make(**options, nonfinite_skips=1, callbacks=[Inspect(tmp_path)])
    trainer.run()
    assert trainer.skipped == {level: 1}
    assert trainer.steps == {"lower": 3, "upper": 2}
    # By hand: the same run without the spoilt batch.
    less = {"lower": (2, 2), "upper": (3, 1)}[level]
    data = (
        {"lower_data": [LOWER_BATCHES[0], LOWER_BATCHES[2]]}
        if level == "lower"
        else {"upper_data": [data["upper_data"][0]]}
    )
    clean = make(**{**options, **data, "schedule": AlternatingSchedule(1, *less)})
    clean.run()
    for name, theirs in clean.levels.items():
        assert all(torch.equal(trainer.levels[name].params[key], leaf) for key, leaf in theirs.params.items())
    saved = torch.load(tmp_path / f"{level}-step-2.pt", weights_only=True)
    assert (saved["event"], saved["step"], saved["indices"]) == (level, 2, None)
    assert saved["levels"]["lower"]["variables"].keys() == clean.lower.params.keys()
    resumed = make(**options, nonfinite_skips=1, callbacks=[Inspect(tmp_path)])
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.skipped == {level: 1}
    with pytest.raises(NonFiniteError, match=rf"{level} step 2 .*indices and state are in .*{level}-step-2\.pt"):
        make(**options, callbacks=[Inspect(tmp_path)]).run()


def test_the_trainer_refuses_a_number_of_skips_that_is_none() -> None:
    for value in (-1, 1.5, True):
        with pytest.raises(ValueError, match="nonfinite_skips"):
            make(nonfinite_skips=value)
