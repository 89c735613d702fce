"""Steps of either level that are not finite: nothing changes, what they were made of is saved, some may be left out."""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import AlternatingSchedule, Checkpointing, Identity, Level, Params
from bilevel.training import Inspect, NonFiniteError, SingleLevelTrainer, gradient_of
from tests.support.problems.two_heads import LOWER_BATCHES, TwoHeads, implicit, make


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


# Steps of a training, those of them that are not finite, and whether it may end so.
ENDINGS = [
    (12, range(2, 12), False),
    (12, range(12), False),
    (12, range(3, 12), True),
    (12, range(1, 11), True),
    (12, [0, 2, 4, 6, 8, 10], True),
    (3, range(3), False),
    (3, [1, 2], True),
    (1, [0], False),
    (0, [], True),
]


class Spoilt:
    """A sound loss, at some calls NaN, or with a gradient that is."""

    def __init__(self, bad: Collection[int], kind: str) -> None:
        self.bad, self.kind, self.calls = bad, kind, 0

    def __call__(self, value: Tensor) -> Tensor:
        spoilt = self.calls in self.bad
        self.calls += 1
        if not spoilt:
            return value
        # The root is 0 there, and has no slope.
        return value * math.nan if self.kind == "loss" else value + (value - value.detach()).sqrt()


class SpoiltHeads(TwoHeads):
    """A level of which some steps are not finite."""

    def __init__(self, level: str, spoilt: Spoilt) -> None:
        self.level, self.spoilt = level, spoilt

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        value = super().lower_objective(upper, lower, batch)
        return self.spoilt(value) if self.level == "lower" else value

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        value = super().upper_objective(upper, lower, batch)
        return self.spoilt(value) if self.level == "upper" else value


def ends(trainer: Any, level: str, steps: int, bad: Collection[int], well: bool) -> None:
    if well:
        trainer.run()
        assert trainer.skipped[level] == len(bad)
        return
    last = len([step for step in bad if all(later in bad for later in range(step, steps))])
    for _ in range(2):
        said = rf"^{level}: the last {last} of {steps} steps were left out, .*\({len(bad)} in all\).* Lower"
        with pytest.raises(NonFiniteError, match=said):
            trainer.run()


@pytest.mark.parametrize(("steps", "bad", "well"), ENDINGS)
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_one_level_that_ends_with_skipped_steps_has_not_ended_well(
    steps: int, bad: Collection[int], well: bool, kind: str, tmp_path: Path
) -> None:
    def training(calls: Collection[int]) -> SingleLevelTrainer:
        x = {"w": torch.ones(2, requires_grad=True)}
        level = Level(x, torch.optim.SGD(x.values(), lr=0.1), [torch.ones(2)])
        spoilt = Spoilt(calls, kind)
        loss = gradient_of(lambda batch: spoilt((x["w"] * batch).sum()), x)
        return SingleLevelTrainer(loss, level, steps, nonfinite_skips=99, callbacks=[Checkpointing(tmp_path)])

    trainer = training(bad)
    trainer.resume(tmp_path)
    ends(trainer, "train", steps, bad, well)
    # Found again in its last checkpoint.
    again = training(())
    assert again.resume(tmp_path)
    ends(again, "train", steps, bad, well)


@pytest.mark.parametrize(("steps", "bad", "well"), [case for case in ENDINGS if case[0] in (12, 3)])
@pytest.mark.parametrize("level", ["lower", "upper"])
def test_either_level_that_ends_with_skipped_steps_has_not_ended_well(
    level: str, steps: int, bad: Collection[int], well: bool
) -> None:
    schedule = AlternatingSchedule(steps, 1, 0 if level == "lower" else 1)
    problem = SpoiltHeads(level, Spoilt(bad, "loss"))
    trainer = make(problem, Identity(), schedule=schedule, nonfinite_skips=99, on_failure="ignore")
    ends(trainer, level, steps, bad, well)


def test_a_last_step_that_makes_a_variable_infinite_is_no_end() -> None:
    x = {"a": torch.ones(2, requires_grad=True), "b": torch.ones(2, requires_grad=True)}
    level = Level(x, torch.optim.SGD(x.values(), lr=1e30), [torch.tensor(1e15)])
    loss = gradient_of(lambda batch: x["a"].sum() + x["b"].sum() * batch, x)
    with pytest.raises(NonFiniteError, match=r"^train: b is not finite after the last of 1 steps; lower the learning"):
        SingleLevelTrainer(loss, level, 1).run()


def test_the_trainer_refuses_a_number_of_skips_that_is_none() -> None:
    for value in (-1, 1.5, True):
        with pytest.raises(ValueError, match="nonfinite_skips"):
            make(nonfinite_skips=value)
