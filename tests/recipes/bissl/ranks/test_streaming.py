"""Several processes, each with workers of its own: the run that they make from memory, and one end for all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.recipes.rank_runs import run_ranks
from tests.support.recipes.sample_photographs import encoded, photograph
from tests.support.recipes.small_runs import weights


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a short run on class folders of photographs of many sizes."""
    root = tmp_path_factory.mktemp("pictures")
    for number in range(90):
        folder = root / "abc"[number % 3]
        folder.mkdir(exist_ok=True)
        (folder / f"{number:02d}.jpg").write_bytes(encoded(photograph(number, 24 + number % 5, 20 + number % 7)))
    return [
        f"--data.pretext=folder:{root}",
        f"--data.downstream=folder:{root}",
        "--data.labels-per-class=10",
        "--bissl.alternations=1",
        "--finetune.epochs=2",
        "--seeds=1",
    ]


def test_streamed_is_from_memory(options: list[str], tmp_path: Path) -> None:
    for storage, workers in (("memory", 0), ("stream", 1)):
        folder = tmp_path / storage
        given = [f"--output-dir={folder}", f"--data.storage={storage}", f"--data.num-workers={workers}"]
        run = run_ranks(2, tmp_path / f"{storage} logs", *options, *given)
        assert run.end() == [0, 0], run.said()
        assert run.said() == [[], []]
    assert weights(tmp_path / "stream") == weights(tmp_path / "memory")
    assert weights(tmp_path / "stream")


def test_a_worker_that_one_rank_loses_ends_all(options: list[str], tmp_path: Path) -> None:
    given = [
        f"--output-dir={tmp_path / 'run'}",
        "--data.storage=stream",
        "--data.num-workers=1",
        "--pretext.task=tests.support.recipes.rank_tasks:LosingAWorker",
        "--pretext.epochs=20",
    ]
    run = run_ranks(2, tmp_path / "logs", *options, *given)
    assert run.end() == [76, 76], run.said()
    said = [line for lines in run.said() for line in lines]
    assert not any("Traceback" in line for line in said)
    assert any("rank 1" in line and "a worker process" in line for line in said), said
