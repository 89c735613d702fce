"""Two hundred trials on one worker and on three that are killed at random: the same trials, the same winner."""

import json
import multiprocessing
import os
import random
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bilevel.checkpoint import load_checkpoint, save_checkpoint
from recipes.experiment.search.plan import StudyPlan
from recipes.experiment.search.space import draw, log_uniform
from recipes.experiment.search.storage import open_storage
from recipes.experiment.search.study import Fit, open_study, prepare
from recipes.experiment.search.trial_record import Scores, TrialRecord, select
from recipes.experiment.stage import Attempt
from tests.support.postgresql import serve

optuna: Any = pytest.importorskip("optuna", reason="a search needs Optuna, of the extra search")
COUNT = 200
STARTED, PROCESS = "started.txt", "process.txt"
HANGING = (3, 17, 18, 39, 80, 120, 160, 199)
"""Trials whose first worker is killed."""


def make_plan(folder: Path, storage: str | None = None, count: int = COUNT) -> StudyPlan:
    space = {"rate": log_uniform(1e-4, 1.0), "decay": log_uniform(1e-5, 1e-2)}
    plan = StudyPlan(folder, space, tuple(draw(space, count, 0)), count, 60.0, storage)
    prepare(plan, lambda: True)
    return plan


def score(values: Mapping[str, Any]) -> float:
    return round(10 * (values["rate"] * 1000 % 1), 1)


def fit(values: Mapping[str, Any], attempt: Attempt) -> Scores:
    """Two epochs, of which a checkpoint keeps the first, and a word of how it began."""
    begun = load_checkpoint(attempt.directory)
    with (attempt.directory / STARTED).open("a") as file:
        file.write(f"{os.getpid()} {begun is not None}\n")
    if begun is None:
        attempt.report(1, 0.0)
        save_checkpoint(attempt.directory, 1, {"x": torch.tensor(values["rate"], dtype=torch.float64)})
        begun = load_checkpoint(attempt.directory)
    assert begun is not None
    assert float(begun[1]["x"]) == values["rate"]
    time.sleep(0.01)
    attempt.check()
    attempt.report(2, score(values))
    return Scores(2, "top", True, score(values), values["decay"], {}, 2, 0.0)


def fit_until_killed(values: Mapping[str, Any], attempt: Attempt) -> Scores:
    """The same, but the first worker at a trial of `HANGING` gets no further than its checkpoint."""
    if int(attempt.directory.name) in HANGING and load_checkpoint(attempt.directory) is None:
        save_checkpoint(attempt.directory, 1, {"x": torch.tensor(values["rate"], dtype=torch.float64)})
        (attempt.directory / PROCESS).write_text(str(os.getpid()))
        time.sleep(600)
        raise AssertionError("nobody killed it")
    return fit(values, attempt)


def work(plan: StudyPlan, fit: Fit = fit) -> None:
    torch.set_num_threads(1)
    with open_study(plan) as study:
        study.work(fit, Console(quiet=True))


def highest(finished: Sequence[tuple[int, Scores]]) -> tuple[list[int], int]:
    """By score, then loss, then number; how many tie is of no interest."""
    return [number for number, s in sorted(finished, key=lambda one: (-one[1].score, one[1].loss, one[0]))], 1


def expected(plan: StudyPlan) -> list[TrialRecord]:
    assert plan.trials is not None
    return [
        TrialRecord(t, "finished", Scores(2, "top", True, score(t.values), t.values["decay"], {}, 2, 0.0))
        for t in plan.trials
    ]


def records(plan: StudyPlan) -> list[TrialRecord]:
    with open_study(plan) as study:
        return study.records()


def work_among_kills(plan: StudyPlan, seed: int) -> None:
    """Let three workers work, kill each that hangs together with one drawn from the three, and replace both."""
    generator, context = random.Random(seed), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])

    def begin() -> BaseProcess:
        process = context.Process(target=work, args=(plan, fit_until_killed))
        process.start()
        return process

    workers = [begin() for _ in range(3)]
    while any(worker.is_alive() for worker in workers):
        hanging = [int(path.read_text() or 0) for path in plan.directory.glob(f"trials/*/{PROCESS}")]
        for place in [place for place, worker in enumerate(workers) if worker.is_alive() and worker.pid in hanging]:
            time.sleep(generator.uniform(0.0, 0.05))
            for killed in {place, generator.randrange(3)}:
                workers[killed].kill()
                workers[killed].join()
                workers[killed] = begin()
        time.sleep(0.02)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]


def check(plan: StudyPlan) -> None:
    found = records(plan)
    assert found == expected(plan)
    assert select(found, highest).winner == select(expected(plan), highest).winner
    name = json.loads((plan.directory / "study.json").read_text())["study"]
    study = optuna.load_study(study_name=name, storage=open_storage(plan.directory, plan.storage))
    # None was enqueued or drawn twice, and none is left.
    assert sorted(trial.user_attrs["id"] for trial in study.trials) == list(range(plan.count))
    assert {trial.state.name for trial in study.trials} == {"COMPLETE"}


def test_one_worker(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, count=40)
    work(plan)
    check(plan)


def test_three_workers_that_are_killed(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    work_among_kills(plan, seed=0)
    check(plan)
    for number in HANGING:
        # It went on from the checkpoint of a dead worker, the last trial too.
        assert (tmp_path / "trials" / f"{number:03d}" / STARTED).read_text().split()[1] == "True"


def test_three_workers_on_postgresql(tmp_path: Path) -> None:
    pytest.importorskip("psycopg", reason="PostgreSQL's driver is in the extra search")
    with serve() as url:
        plan = make_plan(tmp_path / "search", url, count=40)
        work_among_kills(plan, seed=1)
        check(plan)
        assert not list(tmp_path.rglob("study.db"))
        # Another search on the same server is another study.
        make_plan(tmp_path / "other", url, count=1)
        assert len(optuna.get_all_study_names(url)) == 2
