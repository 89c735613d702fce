"""The study of a search: each trial is done once, goes on where another worker stopped, and may end without scores."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bilevel.checkpoint import load_checkpoint, save_checkpoint
from bilevel.training import NonFiniteError
from recipes.experiment.errors import ConfigError
from recipes.experiment.folder.leases import Lease, LeaseLost
from recipes.experiment.search import study as room
from recipes.experiment.search.plan import StudyPlan
from recipes.experiment.search.space import Trial, grid, parse_space
from recipes.experiment.search.storage import open_storage
from recipes.experiment.search.study import Fit, InvalidValues, open_study
from recipes.experiment.search.trial_record import Scores, TrialRecord
from recipes.experiment.stage import Attempt

optuna: Any = pytest.importorskip("optuna", reason="a search needs Optuna, of the extra search")
QUIET = Console(quiet=True)


def make_plan(folder: Path, **changes: Any) -> StudyPlan:
    space, trials = grid({"rate": [1.0, 2.0, 3.0]})
    plan = replace(StudyPlan(folder, space, tuple(trials), len(trials), 60.0), **changes)
    prepare(plan)
    return plan


def prepare(plan: StudyPlan) -> None:
    room.prepare(plan, lambda: True)


def work(plan: StudyPlan, fit: Fit, **given: Any) -> list[TrialRecord]:
    with open_study(plan) as study:
        study.work(fit, QUIET, **given)
        return study.records()


def stored(plan: StudyPlan) -> Any:
    """The study as Optuna itself reads it."""
    name = json.loads((plan.directory / "study.json").read_text())["study"]
    return optuna.load_study(study_name=name, storage=open_storage(plan.directory, plan.storage))


def score(values: Mapping[str, Any], attempt: Attempt) -> Scores:
    attempt.check()
    save_checkpoint(attempt.directory, 1, {"x": torch.ones(1)})
    if values["rate"] == 2.0:
        raise NonFiniteError("loss nan")
    return Scores(1, "top", True, 10.0 * values["rate"], 0.5, {"other": None}, 1, 0.1)


def test_every_trial_is_done_once(tmp_path: Path) -> None:
    plan, asked = make_plan(tmp_path), []

    def fit(values: Mapping[str, Any], attempt: Attempt) -> Scores:
        asked.append(values["rate"])
        return score(values, attempt)

    with open_study(plan) as study:
        study.work(fit, QUIET, only=(2,))
        assert study.missing() == [0, 1]
        study.work(fit, QUIET)
        assert sorted(asked) == [1.0, 2.0, 3.0]
        found = [(record.status, record.message) for record in study.records()]
        assert found == [("finished", None), ("diverged", "loss nan"), ("finished", None)]
        assert study.records()[2].scores == Scores(1, "top", True, 30.0, 0.5, {"other": None}, 1, 0.1)
        study.sweep()
    assert not list(tmp_path.rglob("step-*"))
    assert not [path for path in (tmp_path / "leases").iterdir() if path.name[0] != "."]


def test_the_study_shows_what_the_search_does(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    states = optuna.trial.TrialState
    assert [(t.state, t.params, t.user_attrs) for t in stored(plan).trials] == [
        (states.WAITING, {"rate": rate}, {"id": number}) for number, rate in enumerate((1.0, 2.0, 3.0))
    ]

    def fit(values: Mapping[str, Any], attempt: Attempt) -> Scores:
        running = [trial.params for trial in stored(plan).get_trials(states=(states.RUNNING,))]
        assert running == [values]
        attempt.report(1, 0.5)
        attempt.report(2, float("nan"))
        return score(values, attempt)

    work(plan, fit)
    study = stored(plan)
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    assert [trial.state for trial in study.trials] == [states.COMPLETE, states.PRUNED, states.COMPLETE]
    assert (study.best_trial.number, study.best_value) == (2, 30.0)
    assert list(study.trials[0].intermediate_values) == [1, 2]


def test_a_trial_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    plan, resumed = make_plan(tmp_path), []

    def stopped(values: Mapping[str, Any], attempt: Attempt) -> Scores:
        attempt.report(1, 0.5)
        score(values, attempt)
        raise KeyboardInterrupt

    def fit(values: Mapping[str, Any], attempt: Attempt) -> Scores:
        resumed.append(load_checkpoint(attempt.directory) is not None)
        attempt.report(1, 0.5)
        return score(values, attempt)

    with pytest.raises(KeyboardInterrupt):
        work(plan, stopped)
    with open_study(plan) as study:
        assert study.holders() == []
    work(plan, fit)
    assert resumed == [True, False, False]
    assert [trial.number for trial in stored(plan).trials] == [0, 1, 2]


def test_a_trial_that_was_taken_over_is_left_to_the_other_worker(tmp_path: Path) -> None:
    plan, calls = make_plan(tmp_path), []

    def fit(values: Mapping[str, Any], attempt: Attempt) -> Scores:
        calls.append(values["rate"])
        if len(calls) == 1:
            raise LeaseLost("taken over")
        return score(values, attempt)

    work(plan, fit)
    assert calls == [1.0, 1.0, 2.0, 3.0]


def test_a_worker_that_is_replaced_as_it_draws_a_trial_goes_on_with_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, check, checks = sampled(tmp_path, count=3), Lease.check, list[Lease]()

    def first_lost(lease: Lease) -> None:
        checks.append(lease)
        if len(checks) == 1:
            raise LeaseLost("taken over")
        check(lease)

    monkeypatch.setattr(Lease, "check", first_lost)
    assert [record.trial.number for record in work(plan, peak)] == [0, 1, 2]
    assert [trial.user_attrs.get("id") for trial in stored(plan).trials] == [None, 0, 1, 2]


@pytest.mark.parametrize("reports", [False, True])
def test_the_result_of_a_worker_that_was_too_late_does_not_count(tmp_path: Path, reports: bool) -> None:
    plan = make_plan(tmp_path)

    def late(values: Mapping[str, Any], attempt: Attempt) -> Scores:
        if values["rate"] == 1.0:
            found = stored(plan)
            found.tell(0, 70.0)
        if reports:
            attempt.report(1, 0.5)
        return score(values, attempt)

    found = work(plan, late)
    assert stored(plan).trials[0].value == 70.0
    assert [record.trial.number for record in found] == [0, 1, 2]


def test_what_trials_start_from_is_made_once(tmp_path: Path) -> None:
    plan, made = make_plan(tmp_path), []
    for _ in range(2):
        room.prepare(plan, lambda: True, lambda: bool(made), lambda: made.append(1))
    assert made == [1]
    assert len(stored(plan).trials) == 3


def test_a_worker_that_died_while_it_enqueued_is_helped_out(tmp_path: Path) -> None:
    few = make_plan(tmp_path)
    space, trials = grid({"rate": [1.0, 2.0, 3.0, 4.0, 5.0]})
    more = replace(few, space=space, trials=tuple(trials), count=5)
    prepare(more)
    work(more, score)
    assert [trial.user_attrs["id"] for trial in stored(more).trials] == [0, 1, 2, 3, 4]
    assert [record.trial.values["rate"] for record in work(few, score)] == [1.0, 2.0, 3.0]


def test_trials_of_other_values_and_other_databases_are_refused(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    space, trials = grid({"rate": [1.0, 2.0, 4.0]})
    with pytest.raises(ConfigError, match=r"trial 2 of the study .* is of other values than this search's"):
        prepare(replace(plan, space=space, trials=tuple(trials)))
    other = replace(plan, storage=f"sqlite:///{tmp_path / 'other.db'}")
    with pytest.raises(ConfigError, match=r"--storage: .* keeps its trials in its own folder, not in sqlite:///"):
        prepare(other)
    (tmp_path / "study.db").unlink()
    with pytest.raises(ConfigError, match=r"holds no study '.*'; put the database back, or delete .*study\.json"):
        work(plan, score)


def test_values_that_do_not_go_together_are_a_result(tmp_path: Path) -> None:
    def fit(values: Mapping[str, Any], attempt: Attempt) -> Scores:
        raise InvalidValues("rate and decay")

    found = work(make_plan(tmp_path), fit)
    assert [(record.status, record.message, record.scores) for record in found] == [
        ("invalid", "rate and decay", None)
    ] * 3


def sampled(folder: Path, **changes: Any) -> StudyPlan:
    space = parse_space(["rate=log:1e-3:1", "solver.steps=int:1:9", "kind=choice:a,b,null"])
    return make_plan(folder, **{"space": space, "trials": None, "count": 14, "sampler": "tpe", "seed": 5, **changes})


def peak(values: Mapping[str, Any], attempt: Attempt) -> Scores:
    value = -abs(values["rate"] - 0.1) - abs(values["solver.steps"] - 4) - (values["kind"] is None)
    return Scores(1, "top", True, value, 0.5, {}, 1, 0.1)


def test_a_sampler_draws_the_same_whoever_goes_on(tmp_path: Path) -> None:
    whole = work(sampled(tmp_path / "whole"), peak)
    assert [record.trial.number for record in whole] == list(range(14))
    plan, calls = sampled(tmp_path / "parts"), []

    def stopping(values: Mapping[str, Any], attempt: Attempt) -> Scores:
        calls.append(values)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return peak(values, attempt)

    with pytest.raises(KeyboardInterrupt):
        work(plan, stopping)
    assert work(plan, peak) == whole
    assert work(sampled(tmp_path / "other", seed=6), peak) != whole


def test_trials_without_a_number_do_not_count(tmp_path: Path) -> None:
    plan = sampled(tmp_path, count=3)
    # What a worker leaves that dies as it draws a trial.
    stored(plan).ask()
    with open_study(plan) as study:
        study.work(peak, QUIET)
        assert [record.trial.number for record in study.records()] == [0, 1, 2]
        study.sweep()
    states = [trial.state.name for trial in stored(plan).trials]
    assert states == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]


def test_a_pruner_gives_trials_up(tmp_path: Path) -> None:
    trials = tuple(Trial(number, {"rate": 1.0 if number < 6 else 0.1}) for number in range(7))
    plan = make_plan(tmp_path, space=parse_space(["rate=uniform:0:1"]), trials=trials, count=7, pruner="median")

    def fit(values: Mapping[str, Any], attempt: Attempt) -> Scores:
        for epoch in (1, 2):
            attempt.report(epoch, values["rate"])
        return Scores(2, "top", True, values["rate"], 0.5, {}, 1, 0.1)

    found = work(plan, fit)
    assert [record.status for record in found] == ["finished"] * 6 + ["pruned"]
    assert found[6].message == "by median after epoch 1"
