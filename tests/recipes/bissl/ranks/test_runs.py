"""Runs of the recipe by several processes: what one process makes, one writer, and one end for all."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.soak import passed, soak
from tests.support.recipes.rank_runs import run_ranks, start
from tests.support.recipes.small_runs import (
    SMALL_OPTIONS,
    events,
    execute,
    files,
    leave_out_report,
    results,
    weights,
    whole_run,
    without,
)

LONG = "--pretext.epochs=1000"
# At a tenth of the preset's rates training does not magnify what rounding does.
GENTLE = (
    *("--pretext.lr=0.3", "--head.lr=0.005", "--bissl.lower-lr=0.3"),
    *("--bissl.upper-lr=0.005", "--finetune.lr=0.001"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process."""
    return whole_run(tmp_path_factory.mktemp("whole"), *GENTLE)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by two."""
    folder = tmp_path_factory.mktemp("two")
    run = run_ranks(2, folder / "logs", "--output-dir", str(folder / "run"), *GENTLE, report=True)
    assert run.end() == [0, 0], run.said()
    assert run.said() == [[], []]
    return folder / "run"


# A mean over two shards is that of the whole batch but for a few units of float32's last place. Where these move a unit
# of the network across its kink, a gradient changes by that unit's part, and later losses by the rate times that.
CLOSE = {"loss": 1e-4, "train_loss": 1e-4, "val_loss": 1e-4, "grad_norm": 1e-2, "residual": 1e-2}
SAME = {"event", "stage", "variant", "seed", "step", "epoch", "alternation", "lr", "status", "iterations"}


def assert_close_runs(one: Path, other: Path, slack: float = 1.0) -> None:
    """The same events, with numbers that agree but for rounding; `slack` times as far as `CLOSE` says."""
    for a, b in zip(without(events(one)), without(events(other)), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() & SAME:
            assert a[name] == b[name], (name, a, b)
        for name in a.keys() & CLOSE.keys():
            assert math.isclose(a[name], b[name], rel_tol=slack * CLOSE[name], abs_tol=1e-6), (name, a, b)


def test_two_processes_make_the_run_of_one(whole: Path, two: Path) -> None:
    assert files(whole).keys() == files(two).keys() - {"report.html"}, "one writer"
    assert_close_runs(whole, two)
    assert weights(whole).keys() == weights(two).keys()
    one, other = results(whole), results(two)
    assert one["variants"].keys() == other["variants"].keys()
    assert one["notes"] == other["notes"]
    assert (one["environment"]["processes"], other["environment"]["processes"]) == (1, 2)
    assert (two / "splits.json").read_bytes() == (whole / "splits.json").read_bytes()


def test_killed_and_resumed(tmp_path: Path) -> None:
    figures = soak(SMALL_OPTIONS, 1, 8, tmp_path, ranks=2)
    assert figures["kills"] == 1, figures
    assert figures["others_ended_by"] == {76: 1}, figures
    assert figures["stages"] == 8
    assert passed(figures), figures


def test_a_lost_rank_is_named(tmp_path: Path) -> None:
    run = start(2, tmp_path / "logs", "--output-dir", str(tmp_path / "run"), LONG)
    run.wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and len(events(tmp_path / "run")) > 2)
    victim = run.processes[1]
    victim.kill()
    assert run.end() == [76, -signal.SIGKILL]
    (line,) = run.said()[0]
    assert line.startswith(f"run.py: stopped: rank 1 (process {victim.pid} on ")
    assert "--resume" in line
    assert not list(tmp_path.rglob("*.lease"))


def test_a_rank_that_stands_still_is_named(tmp_path: Path) -> None:
    run = start(2, tmp_path / "logs", "--output-dir", str(tmp_path / "run"), LONG, "--rank-timeout=3")
    run.wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and len(events(tmp_path / "run")) > 2)
    still = run.processes[0]
    assert still.pid is not None
    # Rank 0 serves the store: while it stands still neither answers.
    os.kill(still.pid, signal.SIGSTOP)
    run.processes[1].join(60.0)
    assert run.processes[1].exitcode == 76
    assert run.said()[1][-1].startswith(f"run.py: rank 1: stopped: rank 0 (process {still.pid} on ")
    run.end(0.0)


def test_a_signal_to_one_stops_all_and_the_run_goes_on(two: Path, tmp_path: Path) -> None:
    """One run, stopped by each signal in turn."""
    folder = tmp_path / "run"
    arguments = ("--output-dir", str(folder), "--resume", *GENTLE)
    lines = b""
    for number, code in ((signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)):
        run = start(2, tmp_path / "logs", *arguments)
        ahead = lines.count(b"\n") + 2
        run.wait_for(lambda ahead=ahead: len(made(folder)) > ahead)
        pid = run.processes[1].pid
        assert pid is not None
        os.kill(pid, number)
        assert run.end() == [code, code], run.said()
        assert run.said() == [
            [f"run.py: stopped by {number.name}, and saved; the same command with --resume continues"],
            [],
        ]
        kept = (folder / "metrics.jsonl").read_bytes()
        assert kept.startswith(lines)
        lines = kept
        assert len(events(folder)) < len(events(two))
    assert run_ranks(2, tmp_path / "logs", *arguments).end() == [0, 0]
    assert (folder / "metrics.jsonl").read_bytes().startswith(lines)
    assert weights(folder) == weights(two)
    assert without(events(folder)) == without(events(two))


def test_another_number_of_processes_goes_on_with_the_same_data(whole: Path, tmp_path: Path) -> None:
    arguments = ("--output-dir", str(tmp_path / "run"), *GENTLE)
    run = start(2, tmp_path / "logs", *arguments)
    run.wait_for(lambda: "bissl" in [line["stage"] for line in made(tmp_path / "run")])
    pid = run.processes[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGTERM)
    assert run.end() == [75, 75]
    three = run_ranks(3, tmp_path / "logs", *arguments, "--resume", "pretext", "--arm=baseline")
    assert three.end() == [0, 0, 0], three.said()
    with pytest.MonkeyPatch.context() as patch:
        leave_out_report(patch)
        assert execute(*arguments, "--resume") == 0
    order = lambda line: (line["variant"], line["stage"], line["seed"])  # noqa: E731
    first, second = (sorted(events(folder), key=order) for folder in (whole, tmp_path / "run"))
    for a, b in zip(first, second, strict=True):
        if a["event"] in ("train", "lower", "upper"):
            assert math.isclose(a["loss"], b["loss"], rel_tol=CLOSE["loss"]), (a, b)


def made(folder: Path) -> list[dict[str, Any]]:
    return events(folder) if (folder / "metrics.jsonl").exists() else []


def test_a_nan_on_one_rank_stops_both_before_the_update(tmp_path: Path) -> None:
    task = "--pretext.task=tests.support.recipes.rank_tasks:BrokenOnOneRank"
    run = start(2, tmp_path / "logs", "--output-dir", str(tmp_path / "run"), task)
    assert run.end() == [3, 3], run.said()
    (line,), others = run.said()
    assert others == []
    assert "pretext step 3: loss nan" in line
    (saved,) = (tmp_path / "run" / "inspect").iterdir()
    assert str(saved) in line
    content = torch.load(saved, weights_only=True)
    assert (content["step"], len(content["indices"])) == (3, 24)
    trained = [line for line in events(tmp_path / "run") if line["event"] == "train"]
    assert [line["step"] for line in trained] == [1, 2]
    before = torch.load(next((tmp_path / "run").rglob("step-00000002.pt")), weights_only=True)
    assert all(
        torch.equal(content["kept"]["backbone"][name], before["kept"]["backbone"][name])
        for name in before["kept"]["backbone"]
        if "running" not in name and "tracked" not in name
    )
    # Left out by both alike.
    skipping = run_ranks(
        2, tmp_path / "logs", "--output-dir", str(tmp_path / "b"), task, "pretext", "--nonfinite-skips=1"
    )
    assert skipping.end() == [0, 0], skipping.said()
    assert [line["step"] for line in events(tmp_path / "b") if "skipped" in line] == [3]


def test_what_one_rank_alone_meets_ends_all(tmp_path: Path) -> None:
    task = "--pretext.task=tests.support.recipes.rank_tasks:FailingOnOneRank"
    run = start(2, tmp_path / "logs", "--output-dir", str(tmp_path / "run"), task)
    assert run.end() == [74, 74], run.said()
    (first,), (second,) = run.said()
    assert second.startswith("run.py: rank 1: cannot write: Input/output error (images.bin)")
    assert first.startswith("run.py: stopped: rank 1 (process ")
    assert first.endswith("has ended with exit code 74")


def test_local_statistics_are_joined(whole: Path, tmp_path: Path) -> None:
    run = run_ranks(2, tmp_path / "logs", "--output-dir", str(tmp_path / "run"), *GENTLE, "--compute.batch-norm=local")
    assert run.end() == [0, 0], run.said()
    first = [line["loss"] for line in events(whole) if line["event"] == "train"]
    local = [line["loss"] for line in events(tmp_path / "run") if line["event"] == "train"]
    assert first[0] != pytest.approx(local[0], rel=1e-4), "another model: statistics of 12 images instead of 24"
    assert first[0] == pytest.approx(local[0], rel=0.1)


def test_own_tasks_need_not_know_of_ranks(tmp_path: Path) -> None:
    options = (
        *GENTLE,
        "--pretext.task=tests.support.recipes.plugin_tasks:Colour",
        "--downstream.task=tests.support.recipes.plugin_tasks:Brightness",
        "--pretext.batch-size=13",
        "--downstream.batch-size=11",
    )
    with pytest.MonkeyPatch.context() as patch:
        leave_out_report(patch)
        assert execute("--output-dir", str(tmp_path / "one"), *options) == 0
    run = run_ranks(2, tmp_path / "logs", "--output-dir", str(tmp_path / "two"), *options)
    assert run.end() == [0, 0], run.said()
    # A unit that crosses its kink in one of the two moves later losses by a thousandth; other images would by a tenth.
    assert_close_runs(tmp_path / "one", tmp_path / "two", slack=50.0)
