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
from recipes.experiment.search.study import open_study, prepare
from recipes.experiment.search.trial_record import Scores, TrialRecord, select
from recipes.experiment.stage import Attempt
from tests.support.postgresql import serve

optuna: Any = pytest.importorskip("optuna", reason="a search needs Optuna, of the extra search")
COUNT = 200
STARTED = "started.txt"


def make_plan(folder: Path, storage: str | None = None, count: int = COUNT) -> StudyPlan:
    space = {"rate": log_uniform(1e-4, 1.0), "decay": log_uniform(1e-5, 1e-2)}
    plan = StudyPlan(folder, space, tuple(draw(space, count, 0)), count, 60.0, storage)
    prepare(plan, lambda: True, lambda: None, lambda: True)
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


def work(plan: StudyPlan) -> None:
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


def killed_at_random(plan: StudyPlan, seed: int, kills: int) -> int:
    """Let three workers work of which now and then one is killed and replaced, in the end the one at the last trial.

    Returns:
        How many were killed.
    """
    generator, context, count = random.Random(seed), multiprocessing.get_context("forkserver"), 0
    context.set_forkserver_preload([__name__])

    def begin() -> BaseProcess:
        process = context.Process(target=work, args=(plan,))
        process.start()
        return process

    workers = [begin() for _ in range(3)]
    marks = sorted(generator.sample(range(1, plan.count * 3 // 4), kills))
    with open_study(plan) as study:
        while missing := len(study.missing()):
            if marks and plan.count - missing >= marks[0]:
                marks.pop(0)
                place = generator.randrange(3)
                workers[place].kill()
                workers[place].join()
                workers[place] = begin()
                count += 1
            time.sleep(generator.uniform(0.05, 0.15))
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    return count


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
    plan = make_plan(tmp_path)
    work(plan)
    check(plan)


def test_three_workers_that_are_killed(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    assert killed_at_random(plan, seed=0, kills=8) == 8
    check(plan)
    began = [line.split() for path in tmp_path.glob(f"trials/*/{STARTED}") for line in path.read_text().splitlines()]
    assert len({process for process, _ in began}) == 3 + 8


def hang(plan: StudyPlan) -> None:
    def fit_until_killed(values: Mapping[str, Any], attempt: Attempt) -> Scores:
        save_checkpoint(attempt.directory, 1, {"x": torch.tensor(values["rate"], dtype=torch.float64)})
        (plan.directory / "hangs").touch()
        time.sleep(600)
        raise AssertionError("was not killed")

    with open_study(plan) as study:
        study.work(fit_until_killed, Console(quiet=True))


def test_the_last_trial_s_worker_is_killed(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, count=4)
    with open_study(plan) as study:
        study.work(fit, Console(quiet=True), only=(0, 1, 2))
    process = multiprocessing.get_context("forkserver").Process(target=hang, args=(plan,))
    process.start()
    while not (tmp_path / "hangs").exists():
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()
    with open_study(plan) as study:
        assert (study.missing(), study.holders()) == ([3], [])
    work(plan)
    check(plan)
    # It went on from the checkpoint of the dead one.
    assert (tmp_path / "trials" / "003" / STARTED).read_text().split()[1] == "True"


def test_three_workers_on_postgresql(tmp_path: Path) -> None:
    pytest.importorskip("psycopg", reason="PostgreSQL's driver is in the extra search")
    with serve(tmp_path / "server") as url:
        plan = make_plan(tmp_path / "search", url, count=60)
        assert killed_at_random(plan, seed=1, kills=4) == 4
        check(plan)
