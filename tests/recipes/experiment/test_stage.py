"""A stage is made once: by the first process that comes, from checkpoints that are there, and found afterwards."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bilevel import interruption
from bilevel.checkpoint import load_checkpoint, save_checkpoint
from recipes.experiment.artifacts import Artifact, ArtifactStore
from recipes.experiment.errors import ConfigError
from recipes.experiment.folder.folder_lease import leased
from recipes.experiment.stage import Attempt, CachedStage, discard_checkpoints


def fit(attempt: Attempt) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    found = load_checkpoint(attempt.directory)
    attempt.check()
    save_checkpoint(attempt.directory, 1, {"x": torch.ones(1)})
    return {"net": nn.Linear(1, 1)}, {"seconds": 1.0, "resumed": found is not None}


def never(attempt: Attempt) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    pytest.fail("made again")


def test_a_finished_stage_is_found(tmp_path: Path) -> None:
    stage = CachedStage(ArtifactStore(tmp_path), "fit", "key")
    made = stage.run(fit)
    assert made.info["resumed"] is False
    # Neither checkpoints nor the lease stay.
    assert sorted(path.name for path in made.directory.iterdir()) == ["artifact.json", "weights.safetensors"]
    assert stage.run(never) == made
    assert CachedStage(stage.store, "fit", "other").run(fit) != made


def test_an_interrupted_stage_goes_on_and_is_let_go(tmp_path: Path) -> None:
    stage = CachedStage(ArtifactStore(tmp_path), "fit", "key")

    def interrupted(attempt: Attempt) -> tuple[dict[str, nn.Module], dict[str, Any]]:
        fit(attempt)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage.run(interrupted)
    assert stage.run(fit).info["resumed"] is True


def test_one_process_makes_it(tmp_path: Path) -> None:
    stage = CachedStage(ArtifactStore(tmp_path), "fit", "key")
    with (
        leased(stage.store.directory("fit", "key"), "artifacts"),
        pytest.raises(ConfigError, match=r"artifacts: .* is in use"),
    ):
        stage.run(never)


def test_what_another_process_has_finished_meanwhile_is_taken(tmp_path: Path) -> None:
    class Late(ArtifactStore):
        """Another process finishes the stage between the first look and the lease."""

        looks = 0

        def find(self, stage: str, key: str) -> Artifact | None:
            self.looks += 1
            return None if self.looks == 1 else super().find(stage, key)

    made = CachedStage(ArtifactStore(tmp_path), "fit", "key").run(fit)
    assert CachedStage(Late(tmp_path), "fit", "key").run(never) == made


def test_only_checkpoints_are_discarded(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 4, {"x": torch.ones(1)})
    (tmp_path / "weights.safetensors").write_bytes(b"x")
    discard_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]


def test_a_store_that_waits_takes_what_the_other_process_made(tmp_path: Path) -> None:
    stage = CachedStage(ArtifactStore(tmp_path, waits=True), "fit", "key")
    entered, go_on = threading.Event(), threading.Event()

    def slow(attempt: Attempt) -> tuple[dict[str, nn.Module], dict[str, Any]]:
        entered.set()
        assert go_on.wait(60)
        return fit(attempt)

    made: list[Artifact] = []
    first = threading.Thread(target=lambda: made.append(stage.run(slow)))
    first.start()
    assert entered.wait(60)
    threading.Timer(0.5, go_on.set).start()
    assert stage.run(never).info["sha256"]
    first.join()
    assert made == [stage.run(never)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_waiting(number: signal.Signals, tmp_path: Path) -> None:
    stage = CachedStage(ArtifactStore(tmp_path, waits=True), "fit", "key")
    with leased(stage.store.directory("fit", "key"), "artifacts"), interruption.Interruption():
        threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
        with pytest.raises(interruption.Interrupted):
            stage.run(never)
