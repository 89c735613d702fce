"""What is said about a run's images, and what loading them is estimated to cost."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.bissl.outcome import estimate
from recipes.bissl.outcome.loading_cost import ImageCost, LoadingCost, measure_loading
from recipes.bissl.outcome.reading_words import NOT_COMPARED, memory_line, reading_lines, start_lines
from recipes.bissl.training.datasets import Datasets
from recipes.vision.pictures import space
from recipes.vision.pipeline.work import Work
from recipes.vision.record.reading import reading
from tests.recipes.vision.record.test_listing import arrays
from tests.support.recipes.image_trees import picture, tree
from tests.support.recipes.small_runs import execute, small_config

ALL = ("--data.labels-per-class=null", "--data.val-per-class=null", "--data.pretext-limit=null")


class Pictures:
    """A Dataset of so many pictures; larger ones hold the smaller ones."""

    def __init__(self, count: int = 12) -> None:
        self.targets = [number % 2 for number in range(count)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return picture(index), self.targets[index]


def folders(tmp_path: Path, *options: str) -> Datasets:
    tree(tmp_path / "flat", {"": 30}, seed=1)
    labelled = tree(tmp_path / "labelled", {"a": 16, "b": 24})
    (labelled / "a" / "notes.txt").touch()
    (labelled / "beside.png").touch()
    (tmp_path / "flat" / "clip.gif").touch()
    sources = f"--data.pretext=folder:{tmp_path}/flat", f"--data.downstream=folder:{tmp_path}/labelled"
    return Datasets(small_config(*sources, *ALL, *options))


@pytest.mark.parametrize(
    ("storage", "said"), [("stream", "read when they are needed"), ("memory", "in memory"), ("auto", "in memory")]
)
def test_numbers_bytes_classes_and_what_was_passed_over(tmp_path: Path, storage: str, said: str) -> None:
    data = folders(tmp_path, f"--data.storage={storage}", "--data.num-workers=3")
    facts, size = data.reading(), sum(path.stat().st_size for path in (tmp_path / "flat").glob("*.png"))
    assert (facts["pretext"]["images"], facts["pretext"]["bytes"]) == (30, size)
    assert facts["classes"] == {"a": 16, "b": 24}
    assert sum(facts[part]["images"] for part in ("train", "val", "test")) == 40
    lines = start_lines(data)
    assert lines[0] == f"pretext images: 30 of folder:{tmp_path}/flat, {space.size_text(size)}, {said}"
    assert "2 classes with labelled images: a 16, b 24" in lines
    assert f"folder:{tmp_path}/flat: passed over 1 file (.gif 1)" in lines
    labelled = next(line for line in lines if line.startswith(f"folder:{tmp_path}/labelled: "))
    assert "passed over 2 files" in labelled
    assert ".txt 1" in labelled
    held = [line for line in lines if line.startswith("images in memory take ")]
    if storage == "stream":
        assert "images are read and cropped by 3 worker processes" in lines
        assert not held
    else:
        # 70 images of 20 x 20 px.
        assert held
        assert held[0].startswith("images in memory take 84 kB")


@pytest.mark.parametrize("storage", ["stream", "memory"])
@pytest.mark.parametrize(("pretext", "compared"), [("?a=13", "in memory"), ("", "always"), ("folder", "never")])
def test_what_cannot_be_compared_is_said(tmp_path: Path, storage: str, pretext: str, compared: str) -> None:
    tree(tmp_path / "flat", {"": 12})
    own = "tests.recipes.bissl.outcome.test_reading_words:Pictures"
    source = f"folder:{tmp_path}/flat" if pretext == "folder" else own + pretext.replace("a", "count")
    given = f"--data.pretext={source}", f"--data.downstream={own}", f"--data.storage={storage}"
    data = Datasets(small_config(*given, *ALL))
    known = compared == "always" or (compared == "in memory" and storage == "memory")
    assert data.reading()["compared"] == known
    assert (NOT_COMPARED in start_lines(data)) == (not known)
    if compared == "in memory" and known:
        assert data.reading()["copies"]["test"] == len(data.downstream.test)


def test_many_classes_are_told_by_the_first_the_last_and_extremes() -> None:
    facts: dict[str, Any] = reading(arrays(), {})
    facts["classes"] = {f"c{number:02d}": 10 + (number * 7) % 30 for number in range(20)}
    assert "20 classes with labelled images: c00 10, c01 17, c02 24, c03 31, c04 38, c05 15" in reading_lines(facts)[2]
    facts["classes"] = {f"c{number:02d}": 10 + (number * 7) % 30 for number in range(30)}
    assert reading_lines(facts)[2] == (
        "30 classes with labelled images: c00 10, c01 17, c02 24, c03 31, ..., c28 26, c29 33; the fewest 10 (c00), "
        "the most 39 (c17)"
    )


@pytest.mark.parametrize(
    ("copies", "said"),
    [
        ({}, []),
        ({"test": 1, "val": 0}, ["1 pretext image is a copy of test images, byte for byte, and is left out"]),
        ({"test": 2000}, ["2,000 pretext images are copies of test images, byte for byte, and are left out"]),
        ({"train and test": 2}, ["2 test images are copies of train images, byte for byte"]),
        ({"val and test": 1}, ["1 test image is a copy of val images, byte for byte"]),
    ],
)
def test_copies_are_counted(copies: dict[str, int], said: list[str]) -> None:
    assert reading_lines(reading(arrays(), copies))[3:] == said


def test_memory_is_that_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = reading(arrays(), {})
    monkeypatch.setattr("recipes.bissl.outcome.reading_words.available_memory", lambda: 2_500_000_000)
    assert memory_line(facts) == "images in memory take 544 bytes; 2.5 GB are left"
    monkeypatch.setattr("recipes.bissl.outcome.reading_words.available_memory", lambda: None)
    assert memory_line(facts) == "images in memory take 544 bytes"


def test_loading_beside_computing_is_divided_by_workers_and_else_added() -> None:
    cost = LoadingCost(ImageCost(0.008, 0.001, 4), ImageCost(0.002, 0.0005, 0))
    beside, added = cost.seconds(1000, 100)
    assert beside == pytest.approx(2.0)
    assert added == pytest.approx(1.0 + 0.2 + 0.05)
    words = cost.line()
    assert "9 ms a pretext image, 8 of them for reading and cropping by each of 4 worker processes" in words
    assert "2.5 ms a labelled image, 2 of them for reading and cropping by the process that computes" in words


def test_a_few_images_are_read_to_measure_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, read = folders(tmp_path, "--data.storage=stream", "--data.num-workers=2"), list[int]()
    real = Work.run
    monkeypatch.setattr(Work, "run", lambda work: (read.append(len(work.pictures)), real(work))[1])
    threads = torch.get_num_threads()
    cost = measure_loading(data.config, data, torch.device("cpu"))
    assert cost.pretext.workers == cost.labelled.workers == 2
    assert cost.pretext.loading > 0
    assert set(read) == {30, len(data.downstream.train)}
    assert torch.get_num_threads() == threads
    # Nothing is kept of it: what a run has read is what it has trained on.
    assert not data.identity.contents("pretext").known.any()


@pytest.mark.parametrize(
    ("loading", "computing", "said"),
    [
        (0.0, 100.0, ""),
        (500.0, 100.0, ", which is loading, the longer of 8.3 minutes of loading by workers and 100 seconds of"),
        (50.0, 100.0, ", which is computing, the longer of 50 seconds of loading by workers and 100 seconds of"),
    ],
)
def test_the_longer_of_both_is_said(loading: float, computing: float, said: str) -> None:
    assert estimate._bottleneck(loading, computing).startswith(said)


def test_a_dry_run_says_what_a_run_will_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = folders(tmp_path).config.data
    options = f"--data.pretext={config.pretext}", f"--data.downstream={config.downstream}", *ALL
    capsys.readouterr()
    assert execute("--dry-run", f"--output-dir={tmp_path}/dry", "--data.storage=stream", *options) == 0
    said = capsys.readouterr().out
    assert re.search(r"about .* on this machine, which is (loading|computing), the longer of ", said)
    assert "pretext images: 30 of folder:" in said
    assert "2 classes with labelled images: a 16, b 24" in said
    assert not (tmp_path / "dry" / "images.npz").exists()
