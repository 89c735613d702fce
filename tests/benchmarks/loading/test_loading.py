"""The benchmark of loading: it runs, its page shows the kept figures, and what it says of memory holds."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.loading import memory, run, sides
from benchmarks.loading.photographs import write_photographs
from recipes.vision.pictures.files import FileImages
from recipes.vision.pipeline.work import Work
from recipes.vision.sources.file_table import FileTable
from tests.support.paths import ROOT

KEPT = ROOT / "benchmarks/results/loading.json"
PAGE = ROOT / "docs/images.md"


def test_page_shows_the_kept_figures() -> None:
    assert run.main(["--from", str(KEPT), "--docs", str(PAGE), "--check"]) == 0
    assert not json.loads(KEPT.read_text(encoding="utf-8"))["quick"]


def test_kept_figures_fit_together() -> None:
    figures: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8"))
    assert figures["cores"] == run.cores(figures["speed"])
    assert set(figures["speed"]) >= {"files: crops", "files: whole", "disk cache: crops", "memory: crops"}
    # Parts may be measured one by one.
    if "memory" in figures:
        listing, (few, many) = figures["memory"]["listing"], figures["memory"]["streaming"]
        assert listing["bytes"] <= 200 * listing["files"] == 200_000_000
        assert (few["files"], many["files"]) == (1_000, 20_000)
        assert many["without_files"] < 1.05 * few["without_files"]


def test_ratios_are_of_the_same_repeat() -> None:
    costs = {
        "lightly": [sides.Cost(10, 1.0, 2.0), sides.Cost(10, 2.0, 2.0)],
        "files": [sides.Cost(10, 0.5, 1.0), sides.Cost(10, 0.5, 1.0)],
    }
    found = run.summary(costs)
    assert found["files"]["images_per_second"] == 20.0
    assert found["files"]["images_per_second_ratio"] == 3.0
    assert found["files"]["images_per_core_second_ratio"] == 2.0
    assert run.cores(found) == {"lightly": 3000, "files": 1500}
    assert "images_per_second_ratio" not in run.summary({"files": costs["files"]})["files"]


def test_processor_time_is_counted() -> None:
    before, square = sides.processor_seconds(os.getpid()), torch.randn(400, 400)
    cost = sides.cost_of(lambda: sum(len(square.matmul(square)) // 400 for _ in range(100)))
    assert cost.images == 100
    assert 0 < cost.processor <= sides.processor_seconds(os.getpid()) - before


def test_photographs_are_of_two_classes_and_two_shapes(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "p", 8)
    pictures = list(memory.streamed(folder).items(range(8)))
    assert {tuple(item.picture().shape) for item in pictures} == {(3, 375, 500), (3, 500, 375)}
    assert len({item.picture().sum().item() for item in pictures}) == 8


def test_a_listing_costs_at_most_200_bytes_a_file(tmp_path: Path) -> None:
    found = memory.measured("listing", memory.write_empty(tmp_path / "p", 20_000))
    assert found["files"] == 20_000
    assert 0 < found["bytes"] <= 200 * 20_000


def test_streaming_more_pictures_takes_no_more_memory(tmp_path: Path) -> None:
    pictures = write_photographs(tmp_path / "few", 4)
    folders = [memory.write_links(tmp_path / str(count), pictures, count) for count in (200, 4_000)]
    # What allocators keep differs from time to time by as much as the bound: the smallest of a few is what is needed.
    few, many = ([memory.measured("streaming", folder) for _ in range(3)] for folder in folders)
    assert many[0]["files"] == 20 * few[0]["files"]
    assert min(each["without_files"] for each in many) < 1.05 * min(each["without_files"] for each in few)


def test_evaluation_takes_the_memory_of_a_few_batches(tmp_path: Path) -> None:
    pictures = write_photographs(tmp_path / "few", 4)
    small, large = (
        memory.measured("evaluation", memory.write_links(tmp_path / str(count), pictures, count))
        # Of both, all batches that are under way at a time are there.
        for count in (6 * memory.BATCH, 32 * memory.BATCH)
    )
    batch = memory.BATCH * 3 * 96 * 96 * 4
    assert (large["files"] - small["files"]) // memory.BATCH == 26
    # An allocator that keeps a few freed batches has less to do with it than a set that is kept, of 26 more.
    assert large["bytes"] - small["bytes"] < 6 * batch


def test_what_goes_to_a_worker_does_not_grow_with_the_listing() -> None:
    sizes = []
    for count in (10, 100_000):
        images = FileImages(FileTable.of("/folder", (f"{index:08d}.jpg" for index in range(count))))
        sizes.append(len(pickle.dumps(Work(images.items([3, 5]), []))))
    assert sizes[0] == sizes[1] < 1000


def test_bad_options() -> None:
    with pytest.raises(SystemExit):
        run.main(["--check"])
