"""Whatever fails while a file is written, or is damaged afterwards: it is named, and a good state is left."""

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bilevel.checkpoint import load_checkpoint, save_checkpoint
from recipes.bissl.outcome.side_by_side import all_stages
from tests.support.own_process import in_own_process
from tests.support.recipes.small_runs import execute, refused, results, weights, without

# Calls of the operating system in a save: each of state and manifest is synced, renamed, and its folder synced.
CALLS = [(name, number) for name in ("fsync", "replace") for number in range(1, 5 if name == "fsync" else 3)]


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than such a run."""
    monkeypatch.setattr(all_stages, "write_report", lambda folder: folder)


def state(value: float) -> dict[str, Any]:
    return {"w": torch.full((1000,), value)}


def kill_at(name: str, number: int, *, after: bool) -> None:
    """From now on, die by SIGKILL before or after this call of os.fsync or os.replace."""
    real, left = getattr(os, name), [number]

    def call(*args: Any) -> Any:
        left[0] -= 1
        if left[0] == 0 and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(os, name, call)


def saves_that_are_killed(folder: str, number: str) -> None:
    """One process for each step, and what it leaves."""
    for index, (name, call) in enumerate(CALLS):
        for after in (False, True):
            place = Path(folder) / f"{index}-{after}"
            save_checkpoint(place, 1, state(1.0))

            def killed(place: Path = place, name: str = name, call: int = call, after: bool = after) -> None:
                kill_at(name, call, after=after)
                save_checkpoint(place, int(number), state(2.0))

            process = multiprocessing.get_context("fork").Process(target=killed)
            process.start()
            process.join()
            assert process.exitcode == -signal.SIGKILL, (name, call, after)
            found = load_checkpoint(place)
            assert found is not None
            # The manifest's rename is the moment.
            done = (name, call, after) in (("replace", 2, True), ("fsync", 4, False), ("fsync", 4, True))
            assert float(found[1]["w"][0]) == (2.0 if done else 1.0), (name, call, after)
            save_checkpoint(place, 5, state(5.0), keep=1)
            assert sorted(path.name for path in place.iterdir()) == ["step-00000005.json", "step-00000005.pt"]
    print(len(CALLS))


# Checkpoint 2 is new, or replaces one of its number.
@pytest.mark.parametrize("number", ["1", "2"])
def test_killed_inside_any_step_of_a_save(number: str, tmp_path: Path) -> None:
    assert in_own_process(saves_that_are_killed, str(tmp_path), number) == (0, "6\n", "")


def test_a_checkpoint_of_the_same_number_replaces_the_other_when_it_is_whole(tmp_path: Path) -> None:
    first = save_checkpoint(tmp_path, 3, state(1.0))
    second = save_checkpoint(tmp_path, 3, state(2.0))
    assert first != second
    assert not first.exists()
    assert save_checkpoint(tmp_path, 3, state(3.0)) == first
    assert not second.exists()
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert float(found[1]["w"][0]) == 3.0


class Full:
    """A file system that takes no more from a certain save on."""

    def __init__(self, number: int, code: int) -> None:
        self.left, self.code, self.real = number, code, os.fsync

    def __call__(self, descriptor: int) -> None:
        self.left -= 1
        if self.left <= 0:
            raise OSError(self.code, os.strerror(self.code))
        self.real(descriptor)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_file_system_that_takes_no_more_ends_the_run_with_its_code(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "pretext", "--output-dir", str(tmp_path / "a")
    with monkeypatch.context() as patch:
        # After the configuration, the splits and the first checkpoint, two syncs a file.
        patch.setattr(os, "fsync", Full(10, code))
        assert execute(*arguments) == 74
    said = capsys.readouterr().err
    assert said.startswith(f"run.py: cannot write: {os.strerror(code)}; nothing that was saved is lost")
    assert "--resume" in said
    assert list((tmp_path / "a").glob("checkpoints/*/step-*.json"))
    assert not list((tmp_path / "a").rglob("*.tmp"))
    assert execute(*arguments, "--resume") == 0
    assert execute("pretext", "--output-dir", str(tmp_path / "b")) == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def pretext_with_a_limit(folder: str) -> None:
    """Metrics and configuration fit, a checkpoint does not."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    sys.exit(execute("pretext", "--output-dir", folder))


def test_a_limit_on_file_sizes_is_a_message_and_the_run_goes_on_without_it(tmp_path: Path) -> None:
    code, _, said = in_own_process(pretext_with_a_limit, str(tmp_path / "a"))
    assert code == 74
    assert ": cannot write: File too large; nothing that was saved is lost" in said
    assert execute("pretext", "--output-dir", str(tmp_path / "a"), "--resume") == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(all_stages, "write_report", lambda folder: folder)
        assert execute("--output-dir", str(folder)) == 0
    return folder


@pytest.mark.parametrize("file", ["weights.safetensors", "artifact.json"])
def test_a_damaged_artifact_is_named_with_its_remedy(
    file: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    # What came after the bilevel stage is made again, from weights that are damaged.
    for tuned in folder.glob("checkpoints/finetune-*"):
        shutil.rmtree(tuned)
    (made,) = folder.glob("checkpoints/bissl-*")
    content = (made / file).read_bytes()
    (made / file).write_bytes(content[: len(content) // 2])
    said = refused(capsys, "--output-dir", str(folder), "--resume")
    assert f"{made / file}" in said
    assert "delete the folder to remake it" in said
    shutil.rmtree(made)
    assert execute("--output-dir", str(folder), "--resume") == 0
    assert weights(folder) == weights(whole)
    assert without(results(folder)) == without(results(whole))


def test_damage_to_all_checkpoints_of_a_stage_is_an_error_that_names_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = "pretext", "--output-dir", str(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Full(14, errno.ENOSPC))
        assert execute(*arguments) == 74
    capsys.readouterr()
    # A state without a manifest was never finished, and is not taken for a checkpoint.
    damaged = [path for path in tmp_path.glob("checkpoints/*/step-*.pt") if path.with_suffix(".json").exists()]
    assert damaged
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-9])
    said = refused(capsys, *arguments, "--resume")
    assert all(path.name in said for path in damaged)
    assert "no usable checkpoint is left" in said
