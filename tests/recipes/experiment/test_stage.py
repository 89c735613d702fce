"""A stage is made once: by the first process that comes, from checkpoints that are there, and found afterwards."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bilevel.checkpoint import load_checkpoint, save_checkpoint
from recipes.experiment.artifacts import Artifact, ArtifactStore
from recipes.experiment.errors import ConfigError
from recipes.experiment.folder.folder_lease import leased
from recipes.experiment.stage import Attempt, CachedStage, discard_checkpoints


def fit(attempt: Attempt) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    found = load_checkpoint(attempt.directory)
    attempt.check()
    save_checkpoint(attempt.directory, 1, {"x": torch.ones(1)})
    return {"net": nn.Linear(1, 1)}, {"resumed": found is not None, "seconds": 0.0}


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
