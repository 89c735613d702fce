"""Where ranks could part: decisions and draws of their own, errors of one, other ways to compute, late signals."""

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from bilevel import distributed
from recipes.bissl.commands.main import main
from recipes.experiment.errors import ConfigError
from recipes.experiment.ranks.processes import Launch
from tests.support.rank_processes import on_ranks
from tests.support.recipes.rank_runs import run_ranks, start
from tests.support.recipes.small_runs import SMALL_OPTIONS, events, execute, weights, without


def test_graphs_are_kept_by_all_or_none(tmp_path: Path) -> None:
    # 13 and 12 images: graphs of 3.37 and 3.13 million bytes, with the limit between them.
    options = ("--pretext.batch-size=25", "--bissl.hvp=reverse-kept", "--bissl.graph-memory=0.00303", "--seeds=1")
    run = run_ranks(2, tmp_path / "logs", "--output-dir", str(tmp_path / "run"), *options)
    assert run.end() == [0, 0], run.said()


def test_measured_products_are_chosen_together(tmp_path: Path) -> None:
    options = ("--bissl.hvp=auto", "--bissl.graph-memory=0.002", "--pretext.batch-size=25", "--seeds=1")
    run = run_ranks(2, tmp_path / "logs", "--output-dir", str(tmp_path / "run"), *options)
    assert run.end() == [0, 0], run.said()


def test_a_run_with_dropout_resumes_to_the_bit(tmp_path: Path) -> None:
    # Shares of 8 and 7: draws of different length.
    options = ("--downstream.task=tests.support.recipes.rank_tasks:Dropping", "--downstream.batch-size=15", "--seeds=1")
    whole, other = tmp_path / "whole", tmp_path / "other"
    assert run_ranks(2, tmp_path / "logs", "--output-dir", str(whole), *options).end() == [0, 0]
    run = start(2, tmp_path / "logs", "--output-dir", str(other), *options)
    run.wait_for(lambda: (other / "metrics.jsonl").exists() and "upper" in [line["event"] for line in events(other)])
    pid = run.processes[1].pid
    assert pid is not None
    os.kill(pid, signal.SIGTERM)
    assert run.end() == [75, 75], run.said()
    assert run_ranks(2, tmp_path / "logs", "--output-dir", str(other), *options, "--resume").end() == [0, 0]
    assert weights(other) == weights(whole)
    assert without(events(other)) == without(events(whole))


def test_weights_of_an_artifact_start_every_rank(tmp_path: Path) -> None:
    assert execute("pretext", "--output-dir", str(tmp_path / "one"), "--pretext.epochs=1") == 0
    (made,) = tmp_path.glob("one/checkpoints/pretext-*")
    options = (f"--init-backbone={made}", "--rank-timeout=30")
    run = run_ranks(2, tmp_path / "logs", "pretext", "--output-dir", str(tmp_path / "two"), *options)
    assert run.end() == [0, 0], run.said()


def test_a_rank_that_computes_long_is_waited_for(tmp_path: Path) -> None:
    task = "--pretext.task=tests.support.recipes.rank_tasks:SlowOnOneRank"
    run = start(2, tmp_path / "logs", "--output-dir", str(tmp_path / "run"), task)
    assert run.end(60.0) == [74, 74], run.said()
    assert [len(lines) for lines in run.said()] == [1, 0], "rank 0 has told it"


def test_signals_that_come_again_change_nothing(tmp_path: Path) -> None:
    run = start(2, tmp_path / "logs", "--output-dir", str(tmp_path / "run"), "--pretext.epochs=1000")
    run.wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and len(events(tmp_path / "run")) > 2)
    for _ in range(20):
        for process in run.processes:
            # It may have ended a moment ago.
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        time.sleep(0.02)
    assert run.end() == [75, 75], run.said()
    assert [len(lines) for lines in run.said()] == [1, 0]


def test_other_configurations_and_commands_are_refused(tmp_path: Path) -> None:
    at = ("--output-dir", str(tmp_path / "run"))
    run = start(2, tmp_path / "logs", *at, own=[[], ["--pretext.lr=0.123"]])
    assert run.end(60.0) == [2, 2], run.said()
    assert "rank 1 (process" in run.said()[0][0]
    assert "another configuration than rank 0" in run.said()[1][0]
    assert "pretext.lr" in run.logs[1].read_text()
    run = start(2, tmp_path / "logs", *at, own=[["pretext"], []])
    assert run.end(60.0) == [2, 2], run.said()
    assert "was started for something else" in run.said()[1][0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--downstream.task=tests.support.recipes.rank_tasks:OwnlyNormed", "compute.batch_norm: 0 is a OwnNorm"),
        ("--compute.compile=true", "compute.compile: "),
        ("--compute.micro-batch=8", "compute.micro_batch: "),
        ("--bissl.hvp=forward", "bissl.hvp: "),
        ("--pretext.batch-size=47", "pretext.batch_size: "),
        ("--data.pretext=folder:/nowhere", "/nowhere"),
    ],
)
def test_what_several_processes_cannot_do_is_refused_once(option: str, said: str, tmp_path: Path) -> None:
    ranks = 3 if "47" in option else 2
    limit = ["--data.pretext-limit=49"] if "47" in option else []
    run = start(ranks, tmp_path / "logs", "--output-dir", str(tmp_path / "run"), option, *limit)
    assert run.end(60.0) == [2] * ranks, run.said()
    (line,), *others = run.said()
    assert line.startswith("run.py: error: ")
    assert said in line
    assert others == [[]] * (ranks - 1)


def test_tools_run_in_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert main(["table", "runs/a"]) == 2
    assert "table runs in one process, but 2 were started" in capsys.readouterr().err
    assert main([*SMALL_OPTIONS, "--dry-run"]) == 2


def test_the_environment_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "a.b", "MASTER_PORT": "29500"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert Launch.of_environment() == Launch(1, 2, 0, "a.b", 29500)
    wrong = [("MASTER_PORT", "70000"), ("MASTER_PORT", "x"), ("RANK", "2"), ("RANK", "-1"), ("WORLD_SIZE", "two")]
    for name, value in [*wrong, ("WORLD_SIZE", "0"), ("LOCAL_RANK", "²"), ("MASTER_ADDR", "")]:
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(ConfigError, match=f"{name}: "):
                Launch.of_environment()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Launch.of_environment() == Launch()
    assert main([*SMALL_OPTIONS, "--rank-timeout=1e15", "--dry-run"]) == 2


def test_a_port_in_use_and_ranks_that_do_not_come_are_told_apart(tmp_path: Path) -> None:
    at = ("--output-dir", str(tmp_path / "run"), "--rank-timeout=2")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = start(1, tmp_path / "logs", *at, changes={"WORLD_SIZE": 2, "MASTER_PORT": port})
        assert run.end(60.0) == [2]
        assert f"MASTER_PORT: {port} is in use" in run.said()[0][0]
    for rank in (0, 1):
        run = start(1, tmp_path / "logs", *at, changes={"WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank})
        assert run.end(60.0) == [2]
        assert "did not meet at 127.0.0.1:" in run.said()[0][0], "without torchrun everybody tells"


def test_other_starting_values_are_refused(tmp_path: Path) -> None:
    found = on_ranks(started_apart, tmp_path)
    for ranks in found.values():
        assert ranks[0] == ["none", "none"]
        assert all(said[0] == "none" for said in ranks)
        assert all("lower['w'] has other values on rank" in said[1] for said in ranks[1:])


def started_apart() -> list[str]:
    """What is said of variables that are alike, and of ones that are not."""
    said = []
    for value in (1.0, float(distributed.rank())):
        try:
            distributed.check_replicated("lower", {"w": torch.full((2,), value)})
            said.append("none")
        except ValueError as error:
            said.append(str(error))
    return said
