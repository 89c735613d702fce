"""A run whose arms and seeds are made side by side is the run made in turn, whatever becomes of its processes."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from recipes.bissl.outcome.open_run import FinishedStages, Unfinished
from recipes.bissl.outcome.side_by_side import workers
from recipes.bissl.outcome.side_by_side.job_graph import jobs_of
from recipes.bissl.outcome.side_by_side.workers import worker_count
from recipes.experiment.events import LOCK
from recipes.experiment.folder.run_folder import METRICS
from tests.support.rank_processes import forkserver
from tests.support.recipes.small_runs import (
    events,
    execute,
    leave_out_report,
    part,
    refused,
    results,
    run_stage,
    small_config,
    small_pipeline,
    weights,
    whole_run,
    without,
)

SECONDS = 100.0
LONG = ("--pretext.epochs=30", "--pretext.checkpoint-every=10", "--pretext.monitor-every=10")
"""A stage 1 in which there is time to do something to the processes that make it."""

ARMS = "--arms=bissl,baseline,scratch,identity,restart,baseline-labels"


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_report(monkeypatch)
    forkserver()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stages long enough, made in turn without an interruption."""
    return whole_run(tmp_path_factory.mktemp("whole"), *LONG)


def timeless(folder: Path) -> Any:
    """What a run left, but for the time it took."""
    return weights(folder), without(results(folder)), without(events(folder))


def wait_for(met: Callable[[], bool]) -> None:
    until = time.monotonic() + SECONDS
    while not met():
        assert time.monotonic() < until
        time.sleep(0.005)


def stages_under_way(folder: Path) -> dict[int, Path]:
    """Processes that hold the lease of a stage, by number, with the stage's folder."""
    held = {}
    for path in folder.glob("checkpoints/*/.writer.*.lease"):
        try:
            held[json.loads(path.read_text())["pid"]] = path.parent
        except (FileNotFoundError, ValueError):
            continue
    return held


@pytest.mark.parametrize(
    ("options", "stages"), [(["--seeds=3"], 10), (["--pipeline-seeds=2", ARMS], 24)], ids=["tunings", "everything"]
)
def test_the_result_is_the_same_to_the_bit_for_any_number_of_processes(
    options: list[str], stages: int, tmp_path: Path
) -> None:
    runs = [whole_run(tmp_path / f"{jobs}", *options, f"--jobs={jobs}") for jobs in (1, 2, 3)]
    assert len(weights(runs[0])) == stages
    for run in runs[1:]:
        assert timeless(run) == timeless(runs[0])
        names = {path.name for path in run.iterdir()}
        assert names == {path.name for path in runs[0].iterdir()}


def test_processes_that_need_the_same_stage_make_it_once(tmp_path: Path) -> None:
    """The heads of given weights, which both arms' stage 1 begins with."""
    pipeline, given = small_pipeline(tmp_path / "given", small_config()), tmp_path / "given.safetensors"
    save_file(part(run_stage(pipeline, "pretext"), "backbone"), given)
    options = (f"--model.init-backbone={given}", "--model.projector-epochs=20")
    runs = [whole_run(tmp_path / f"{jobs}", *options, f"--jobs={jobs}") for jobs in (1, 3)]
    assert len(list(runs[1].glob("checkpoints/projector-*"))) == 1
    # Whichever arm's process made it.
    assert {event["variant"] for event in events(runs[1]) if event["stage"] == "projector"} == {"bissl"}
    assert timeless(runs[1]) == timeless(runs[0])


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 130)])
def test_a_signal_saves_all_stages_under_way(
    number: str, code: int, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def send() -> None:
        metrics = tmp_path / METRICS
        wait_for(lambda: len(stages_under_way(tmp_path)) == 2 and metrics.exists() and metrics.stat().st_size > 0)
        os.kill(os.getpid(), signal.Signals[number])

    sender = threading.Thread(target=send)
    sender.start()
    given = (*LONG, "--output-dir", str(tmp_path), "--jobs=2")
    assert execute(*given) == code
    sender.join()
    said = capsys.readouterr().err
    assert said == f"run.py: stopped by {number}, and saved; the same command with --resume continues\n"
    assert not list(tmp_path.rglob("*.lease"))
    before = (tmp_path / METRICS).read_text().splitlines()
    # As after SIGKILL.
    (tmp_path / LOCK).touch()
    # In another number of processes, too.
    assert execute(*given[:-1], "--jobs=1", "--resume") == 0
    assert not (tmp_path / LOCK).exists()
    # No step that was finished is made again.
    assert set(before) <= set((tmp_path / METRICS).read_text().splitlines())
    assert timeless(tmp_path) == timeless(whole)


def test_a_worker_that_is_killed_is_named_and_the_run_goes_on(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def kill() -> None:
        wait_for(lambda: any(path.name.startswith("pretext") for path in stages_under_way(tmp_path).values()))
        victim = next(pid for pid, path in stages_under_way(tmp_path).items() if path.name.startswith("pretext"))
        os.kill(victim, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    given = (*LONG, "--output-dir", str(tmp_path), "--jobs=2")
    assert execute(*given) == 76
    killer.join()
    said = capsys.readouterr().err
    assert said.startswith("run.py: stopped: the worker process of pre-training, ")
    assert said.endswith("for want of memory; the same command with --resume continues\n")
    assert execute(*given, "--resume") == 0
    assert timeless(tmp_path) == timeless(whole)


def run_elsewhere(arguments: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        leave_out_report(patch)
        raise SystemExit(execute(*arguments))


def test_a_run_that_is_killed_leaves_no_process_and_goes_on(whole: Path, tmp_path: Path) -> None:
    given = [*LONG, "--output-dir", str(tmp_path), "--jobs=2"]
    process = forkserver().Process(target=run_elsewhere, args=(given,))
    process.start()
    wait_for(lambda: len(stages_under_way(tmp_path)) == 2)
    workers_of_it = list(stages_under_way(tmp_path))
    process.kill()
    process.join()
    wait_for(lambda: not any(is_running(pid) for pid in workers_of_it))
    assert execute(*given, "--resume") == 0
    assert timeless(tmp_path) == timeless(whole)


def is_running(pid: int) -> bool:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return fields[0] != "Z"


def test_numbers_that_go_wrong_end_with_the_code_and_the_words_of_a_run_in_turn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for jobs in (1, 2):
        given = ("--output-dir", str(tmp_path / str(jobs)), "--head.lr=1e38", f"--jobs={jobs}")
        assert execute(*given) == 3
        said.append(capsys.readouterr().err.splitlines()[-1].replace(str(tmp_path / str(jobs)), "FOLDER"))
    assert said[0] == said[1]
    assert said[1].startswith("run.py: stopped: head ")


def test_a_fault_of_a_plugin_is_a_sentence_with_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, given = (
        "--pretext.task=tests.support.recipes.plugin_tasks:Faulty",
        ("--output-dir", str(tmp_path), "--jobs=2"),
    )
    assert execute(*given, task) == 1
    said = capsys.readouterr().err
    # Both arms meet it, and the run ends with the first.
    log = next(path for path in (tmp_path / "logs").iterdir() if str(path) in said)
    assert said.startswith("run.py: stopped: pre-training, ")
    assert said.endswith(f" failed (ZeroDivisionError: a fault of the task); {log} has the traceback\n")
    assert "Traceback" in log.read_text()
    # The next attempt begins its logs anew.
    assert execute(*given, "--overwrite") == 0
    assert not (tmp_path / "logs").exists()


def test_a_finished_run_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = whole_run(tmp_path, "--jobs=2")
    monkeypatch.setattr(workers, "run_jobs", lambda *given, **options: pytest.fail("started"))
    assert execute("--output-dir", str(run), "--jobs=2", "--resume") == 0


def test_what_is_finished_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_run(tmp_path, "--jobs=1")
    asked: list[Any] = []
    real = workers.run_jobs

    def counting(jobs: Any, *given: Any, done: Any, **options: Any) -> None:
        asked.extend(job.name for place, job in enumerate(jobs) if place not in done)
        real(jobs, *given, done=done, **options)

    monkeypatch.setattr(workers, "run_jobs", counting)
    assert execute("--output-dir", str(tmp_path), "--jobs=2", "--resume", "--seeds=3") == 0
    assert asked == ["fine-tuning, bissl, seed 2", "fine-tuning, baseline, seed 2"]


GRAPHS = {
    ("--seeds=2",): [
        ("pre-training, bissl, seed 0", []),
        ("head warm-up, bissl, seed 0", ["pre-training, bissl, seed 0"]),
        ("bilevel stage, bissl, seed 0", ["head warm-up, bissl, seed 0"]),
        ("fine-tuning, bissl, seed 0", ["bilevel stage, bissl, seed 0"]),
        ("fine-tuning, bissl, seed 1", ["bilevel stage, bissl, seed 0"]),
        ("pre-training, baseline, seed 0", []),
        ("fine-tuning, baseline, seed 0", ["pre-training, baseline, seed 0"]),
        ("fine-tuning, baseline, seed 1", ["pre-training, baseline, seed 0"]),
    ],
    ("--seeds=1", "--arms=bissl,baseline-time,baseline,scratch,restart,identity"): [
        ("pre-training, bissl, seed 0", []),
        ("head warm-up, bissl, seed 0", ["pre-training, bissl, seed 0"]),
        ("bilevel stage, bissl, seed 0", ["head warm-up, bissl, seed 0"]),
        ("fine-tuning, bissl, seed 0", ["bilevel stage, bissl, seed 0"]),
        ("pre-training, baseline, seed 0", []),
        ("fine-tuning, baseline, seed 0", ["pre-training, baseline, seed 0"]),
        ("fine-tuning, scratch, seed 0", []),
        ("restart, restart, seed 0", ["pre-training, bissl, seed 0"]),
        ("fine-tuning, restart, seed 0", ["restart, restart, seed 0"]),
        ("bilevel stage, identity, seed 0", ["head warm-up, bissl, seed 0"]),
        ("fine-tuning, identity, seed 0", ["bilevel stage, identity, seed 0"]),
        (
            "pre-training, baseline-time, seed 0",
            ["bilevel stage, bissl, seed 0", "pre-training, baseline, seed 0"],
        ),
        ("fine-tuning, baseline-time, seed 0", ["pre-training, baseline-time, seed 0"]),
    ],
    ("--pipeline-seeds=2", "--pretext.baseline-lr=0.5", "--arms=bissl,baseline,baseline-warmup-lr,baseline-labels"): [
        job
        for seed in (0, 1)
        for job in (
            (f"pre-training, bissl, seed {seed}", []),
            (f"head warm-up, bissl, seed {seed}", [f"pre-training, bissl, seed {seed}"]),
            (f"bilevel stage, bissl, seed {seed}", [f"head warm-up, bissl, seed {seed}"]),
            (f"fine-tuning, bissl, seed {seed}", [f"bilevel stage, bissl, seed {seed}"]),
            (f"pre-training, baseline, seed {seed}", []),
            (f"fine-tuning, baseline, seed {seed}", [f"pre-training, baseline, seed {seed}"]),
            # At another rate it is another stage; with more labelled steps it is the same.
            (f"pre-training, baseline-warmup-lr, seed {seed}", []),
            (f"fine-tuning, baseline-warmup-lr, seed {seed}", [f"pre-training, baseline-warmup-lr, seed {seed}"]),
            (f"fine-tuning, baseline-labels, seed {seed}", [f"pre-training, baseline, seed {seed}"]),
        )
    ],
}


@pytest.mark.parametrize("options", GRAPHS)
def test_jobs_stand_in_the_order_of_a_run_in_turn_with_what_each_needs(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    jobs = jobs_of(small_pipeline(tmp_path, small_config(*options)))
    assert [(job.name, [jobs[place].name for place in job.after]) for job in jobs] == GRAPHS[options]


def test_jobs_make_all_that_a_run_looks_for(tmp_path: Path) -> None:
    """In the order of the list, in one process: each makes one stage, and none is left to make."""
    config = small_config("--seeds=1", "--arms=bissl,baseline,scratch,identity,restart,baseline-labels,baseline-time")
    pipeline = small_pipeline(tmp_path, config)
    for job in jobs_of(pipeline):
        made = len(weights(tmp_path))
        job.task.make(pipeline)
        assert len(weights(tmp_path)) == made + 1, job.name
    made = len(weights(tmp_path))
    pipeline.run()
    assert len(weights(tmp_path)) == made


def test_a_stage_that_is_not_finished_is_told_from_one_that_is_damaged(tmp_path: Path) -> None:
    store = FinishedStages(tmp_path)
    with pytest.raises(Unfinished, match="holds no finished head artifact"):
        store.find("head", "key")


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "cores", "count"),
    [
        (("--jobs=auto", "--threads=1"), 4, 4),
        (("--jobs=auto", "--threads=2"), 5, 2),
        (("--jobs=auto", "--threads=8"), 4, 1),
        (("--jobs=auto", "--threads=null"), 4, 1),
        (("--jobs=3", "--threads=1"), 1, 3),
        (("--jobs=1",), 4, 1),
    ],
)
def test_auto_takes_the_cores_that_there_are(
    options: tuple[str, ...], cores: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "available_cores", lambda: cores)
    assert worker_count(small_config(*options), CPU) == count


def test_auto_is_in_turn_on_a_gpu_and_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "available_cores", lambda: 4)
    config = small_config("--jobs=auto")
    assert worker_count(config, torch.device("cuda")) == 1
    monkeypatch.setattr(workers, "world_size", lambda: 2)
    assert worker_count(config, CPU) == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--jobs=2", "--threads=null"), "jobs: 2 processes share the cores"),
        (("--jobs=0",), "jobs"),
        (("--jobs=some",), "jobs"),
    ],
)
def test_what_cannot_be_is_refused(
    given: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, *given, "--output-dir", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
