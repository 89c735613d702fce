"""Runs that are interrupted anywhere and resumed end as if they had not been."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recipes.bissl.commands import main as run
from recipes.bissl.training.stages import pretext
from tests.support.recipes.small_runs import (
    before_steps,
    events,
    execute,
    files,
    leave_out_report,
    of_stage,
    results,
    stop_at,
    weights,
    whole_run,
    without,
)


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_report(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    return whole_run(tmp_path_factory.mktemp("whole"))


def interrupt(monkeypatch: pytest.MonkeyPatch, stage: str, call: int, *arguments: str) -> int:
    """Exit code of a run in which step number `call` of a stage, over all arms and seeds, meets Ctrl-C."""
    with monkeypatch.context() as patch:
        before_steps(patch, stage, stop_at(call))
        return execute(*arguments)


def places(folder: Path) -> list[tuple[Any, ...]]:
    return [tuple(line[name] for name in ("stage", "variant", "seed", "event", "step")) for line in events(folder)]


def assert_same_run(folder: Path, whole: Path) -> None:
    assert weights(folder) == weights(whole)
    assert without(results(folder)) == without(results(whole))
    assert without(events(folder)) == without(events(whole))
    assert len(set(places(folder))) == len(places(folder))
    assert files(folder).keys() == files(whole).keys()


# Steps in all: pretext 4 + 8 (a checkpoint after every second), head 4, upper level 4 (a checkpoint after every
# second), fine-tuning 4 x 8 (a checkpoint after every second, a validation after every fourth).
POINTS = [("pretext", 1), ("pretext", 4), ("pretext", 9), ("head", 3), ("bissl", 1), ("bissl", 4)]
POINTS += [("finetune", 7), ("finetune", 32)]


@pytest.mark.parametrize(("stage", "call"), POINTS)
def test_resumed_is_uninterrupted(
    stage: str,
    call: int,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = "--output-dir", str(tmp_path)
    assert interrupt(monkeypatch, stage, call, *arguments) == 130
    error = capsys.readouterr().err
    assert error.splitlines()[-1] == "run.py: interrupted; the same command with --resume continues"
    assert "Traceback" not in error
    assert not (tmp_path / "results.json").exists()
    assert execute(*arguments, "--resume") == 0
    assert_same_run(tmp_path, whole)


def test_interrupted_again_and_again(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = "--output-dir", str(tmp_path), "--resume"
    for stage, call in (("pretext", 3), ("pretext", 2), ("head", 4), ("bissl", 3), ("bissl", 2), ("finetune", 20)):
        assert interrupt(monkeypatch, stage, call, *arguments) == 130
    assert execute(*arguments) == 0
    assert_same_run(tmp_path, whole)


def test_resuming_goes_on_from_the_last_checkpoint(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = "--output-dir", str(tmp_path)
    assert interrupt(monkeypatch, "bissl", 4, *arguments) == 130
    # One of two alternations is done: two hypergradients are left, so that a third would interrupt.
    assert interrupt(monkeypatch, "bissl", 3, *arguments, "--resume") == 0


def test_seconds_count_both_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr("time.perf_counter", clock)
    arguments = "pretext", "--output-dir", str(tmp_path)
    assert interrupt(monkeypatch, "pretext", 4, *arguments) == 130
    now[0] += 10_000
    assert execute(*arguments, "--resume") == 0
    (info,) = tmp_path.glob("checkpoints/pretext-*/artifact.json")
    seconds = without(run.read_stage(info.parent).info, ())["seconds"]
    assert 0 < seconds < 10_000


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = "--output-dir", str(tmp_path)
    assert interrupt(monkeypatch, "finetune", 7, *arguments) == 130
    newest = sorted(tmp_path.glob("checkpoints/finetune-*/step-*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"step-0+6.pt is damaged.*using step 4"):
        assert execute(*arguments, "--resume") == 0
    assert_same_run(tmp_path, whole)


def test_stages_that_were_deleted_are_made_again(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    for stage in ("head", "bissl"):
        (path,) = (tmp_path / "run" / "checkpoints").glob(f"{stage}-*")
        shutil.rmtree(path)
    assert execute("--output-dir", str(tmp_path / "run"), "--resume") == 0
    assert weights(tmp_path / "run") == weights(whole)
    assert sorted(places(tmp_path / "run")) == sorted(places(whole))


def test_more_seeds_before_an_unfinished_stage_keep_their_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = "--output-dir", str(tmp_path)
    assert interrupt(monkeypatch, "pretext", 8, *arguments) == 130
    # The third seed of the first arm is now trained before the second arm's stage goes on.
    assert execute(*arguments, "--seeds", "3", "--resume") == 0
    found = places(tmp_path)
    assert len(set(found)) == len(found)
    for arm in ("bissl", "baseline"):
        for seed in (0, 1, 2):
            steps = [step for *where, event, step in found if where == ["finetune", arm, seed] and event == "train"]
            assert steps == list(range(1, 9))
    baseline = [step for *where, event, step in found if where == ["pretext", "baseline", 0] and event == "train"]
    assert baseline == list(range(1, 9))


def test_runs_that_share_stages_keep_their_own_events(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = "--artifacts", str(tmp_path / "store")
    assert interrupt(monkeypatch, "head", 3, "--output-dir", str(tmp_path / "a"), *shared) == 130
    first = files(tmp_path / "a")
    assert execute("--output-dir", str(tmp_path / "b"), *shared) == 0
    assert files(tmp_path / "a") == first
    assert weights(tmp_path / "store") == weights(whole)
    assert without(results(tmp_path / "b")) == without(results(whole))
    stages = {line["stage"] for line in events(tmp_path / "b")}
    assert stages == {"pretext", "head", "bissl", "finetune"}


def test_a_run_stops_with_its_code_and_goes_on_where_skips_are_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, arguments = pretext.pretext_loss, ("pretext", "--output-dir", str(tmp_path))
    calls = [0]

    def second(*given: Any) -> Tensor:
        calls[0] += 1
        return real(*given) * (math.nan if calls[0] == 2 else 1.0)

    monkeypatch.setattr(pretext, "pretext_loss", second)
    assert execute(*arguments) == 3
    said = capsys.readouterr().err
    assert said.startswith("run.py: stopped: pretext step 2: loss nan")
    path = tmp_path / "inspect" / "pretext-bissl-seed-0-train-step-2.pt"
    assert str(path) in said
    saved = torch.load(path, weights_only=True)
    assert len(saved["indices"]) == 24
    assert saved["levels"]["train"].keys() == {"variables", "optimizer", "kind", "scheduler", "schedule"}
    assert saved["kept"].keys() == {"backbone", "heads"}
    calls[0] = 0
    assert execute(*arguments, "--resume", "--nonfinite-skips", "1") == 0
    assert [line["step"] for line in of_stage(tmp_path, "pretext", "train") if "skipped" in line] == [2]
