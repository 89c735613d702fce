"""Views of several sizes, from files of several sizes: multi-crop as a task of one's own."""

from pathlib import Path

import pytest
import torch

from tests.support.recipes.image_trees import picture
from tests.support.recipes.small_runs import (
    batches_of,
    execute,
    of_stage,
    refused,
    results,
    small_config,
    small_pipeline,
    weights,
)

TASK = "--pretext.task=tests.support.recipes.plugin_tasks:MultiCrop"
SIZES = [(32, 16), *[(32, 40), (64, 48), (50, 37)] * 4]
"""Widths and heights of a class's pictures (px)."""

SHORT = [f"--{stage}.epochs=1" for stage in ("pretext", "head", "finetune")]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    for position, name in enumerate(("cats", "dogs", "horses")):
        (root / name).mkdir()
        for i, (width, height) in enumerate(SIZES):
            picture(100 * position + i, width, height).save(root / name / f"{i}.png")
    return root


def options(folder: Path, storage: str, workers: int = 0) -> list[str]:
    data = [f"--data.{part}=folder:{folder}" for part in ("pretext", "downstream")]
    how = [f"--data.storage={storage}", f"--data.num-workers={workers}", "--data.image-size=32"]
    sizes = ["--data.pretext-limit=null", "--pretext.batch-size=10", "--downstream.batch-size=8"]
    return [*data, *how, *sizes, TASK]


def test_a_batch_has_every_view_at_its_size(photographs: Path, tmp_path: Path) -> None:
    config = small_config(*options(photographs, "memory"))
    batches, task = batches_of(small_pipeline(tmp_path, config)), config.pretext_task()
    batch = batches.pretext(task, "test", 3).next()
    assert [tuple(view.shape) for view in batch] == [(10, 3, 32, 32)] * 2 + [(10, 3, 16, 16)] * 4
    assert len({view.flatten()[0].item() for view in batch}) == 6
    sample = batches.pretext_sample(task, 4)
    assert [len(view) for view in sample] == [4] * 6
    assert all(torch.equal(a, b) for a, b in zip(sample, batches.pretext_sample(task, 4), strict=True))


def test_all_stages_streamed_and_in_memory_are_the_same_bits(photographs: Path, tmp_path: Path) -> None:
    for name, storage, workers in (("memory", "memory", 0), ("stream", "stream", 0), ("worker", "stream", 1)):
        folder = f"--output-dir={tmp_path / name}"
        assert execute(*options(photographs, storage, workers), *SHORT, "--seeds=1", folder) == 0
    whole = weights(tmp_path / "memory")
    assert len({name.partition("-")[0] for name in whole}) == 4
    assert weights(tmp_path / "stream") == weights(tmp_path / "worker") == whole
    seen = of_stage(tmp_path / "worker", "pretext", "monitor")
    assert seen
    assert all(line["embedding_spread"] > 0 for line in seen)
    found = results(tmp_path / "stream")["notes"]
    assert [line for line in found if line.startswith("pretext")] == [
        f"pretext view {number}: random crop of {crop} of the image's area, width / height 0.75 to 1.33, "
        f"resized to {side} px"
        for number, (crop, side) in enumerate([("0.4 to 1", 32)] * 2 + [("0.05 to 0.4", 16)] * 4, 1)
    ]


def test_sizes_that_a_backbone_cannot_take_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "--data.image-size=32", "--model.backbone=vit_b_16", TASK, "--dry-run")
    assert "pretext.options: " in message
    assert "16" in message
