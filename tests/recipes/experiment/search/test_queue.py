"""The queue of trials: each is done once, goes on where another worker stopped, and may diverge."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bilevel.checkpoint import load_checkpoint, save_checkpoint
from bilevel.training import NonFiniteError
from recipes.experiment.folder.leases import LeaseLost
from recipes.experiment.search.queue import TrialQueue
from recipes.experiment.search.trial_record import Scores
from recipes.experiment.search.trials import grid
from recipes.experiment.stage import Attempt

QUIET = Console(quiet=True)


def make_queue(folder: Path) -> TrialQueue:
    queue = TrialQueue(folder, tuple(grid({"rate": [1.0, 2.0, 3.0]})), 60.0)
    queue.prepare(lambda: True, lambda: None)
    return queue


def score(values: Mapping[str, float], attempt: Attempt) -> Scores:
    attempt.check()
    save_checkpoint(attempt.directory, 1, {"x": torch.ones(1)})
    if values["rate"] == 2.0:
        raise NonFiniteError("loss nan")
    return Scores(1, "top", True, 10.0 * values["rate"], 0.5, {}, 1, 0.1)


def test_every_trial_is_done_once(tmp_path: Path) -> None:
    queue, asked = make_queue(tmp_path), []

    def fit(values: Mapping[str, float], attempt: Attempt) -> Scores:
        asked.append(values["rate"])
        return score(values, attempt)

    queue.work(fit, QUIET, only=(2,))
    assert [trial.number for trial in queue.missing()] == [0, 1]
    queue.work(fit, QUIET)
    assert sorted(asked) == [1.0, 2.0, 3.0]
    found = [None if record.scores is None else record.scores.score for record in queue.records()]
    assert found == [10.0, None, 30.0]
    assert json.loads((tmp_path / "trials" / "001.json").read_text())["message"] == "loss nan"
    queue.sweep()
    assert not list(tmp_path.rglob("step-*"))
    assert not [path for path in (tmp_path / "leases").iterdir() if path.name[0] != "."]


def test_a_trial_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    queue, resumed = make_queue(tmp_path), []

    def stopped(values: Mapping[str, float], attempt: Attempt) -> Scores:
        score(values, attempt)
        raise KeyboardInterrupt

    def fit(values: Mapping[str, float], attempt: Attempt) -> Scores:
        resumed.append(load_checkpoint(attempt.directory) is not None)
        return score(values, attempt)

    with pytest.raises(KeyboardInterrupt):
        queue.work(stopped, QUIET)
    assert queue.holders() == []
    queue.work(fit, QUIET)
    assert resumed == [True, False, False]


def test_a_trial_that_was_taken_over_is_left_to_the_other_worker(tmp_path: Path) -> None:
    queue, calls = make_queue(tmp_path), []

    def fit(values: Mapping[str, float], attempt: Attempt) -> Scores:
        calls.append(values["rate"])
        if len(calls) == 1:
            raise LeaseLost("taken over")
        return score(values, attempt)

    queue.work(fit, QUIET)
    assert calls == [1.0, 2.0, 3.0, 1.0]


def test_what_trials_start_from_is_made_once(tmp_path: Path) -> None:
    queue, made = make_queue(tmp_path), []
    for _ in range(2):
        queue.prepare(lambda: bool(made), lambda: made.append(1))
    assert made == [1]
