"""STL-10 from small files in its published format, read beside torchvision's own reader."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from torchvision.datasets import STL10

from recipes.vision.sources.loading import DataError, ImageSet, load_downstream, load_pretext
from recipes.vision.sources.published import stl10 as stl10_reader
from recipes.vision.sources.published.catalog import DATASETS
from tests.support.recipes.image_trees import counts, downstream, pretext, rows, same_labels

COUNTS = {"train": 50, "test": 30, "unlabeled": 40}


@pytest.fixture
def stl10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small files in the published format: planes of 96 x 96 bytes column by column, labels 1..10."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for split, count in COUNTS.items():
        generator.integers(0, 256, count * 3 * 96 * 96, dtype=np.uint8).tofile(folder / f"{split}_X.bin")
        if split != "unlabeled":
            (np.arange(count) % 10 + 1).astype(np.uint8).tofile(folder / f"{split}_y.bin")
        monkeypatch.setitem(stl10_reader.STL10_COUNTS, split, count)
    fixed = {part: COUNTS[part] for part in ("train", "test")}
    monkeypatch.setitem(DATASETS, "stl10", replace(DATASETS["stl10"], counts=fixed, pretext=COUNTS["unlabeled"]))
    return tmp_path


def torchvision_stl10(root: Path, split: str, monkeypatch: pytest.MonkeyPatch) -> STL10:
    """Torchvision's reader, told the checksums of the files that are there."""

    def listed(*names: str) -> list[list[str]]:
        return [[n, hashlib.md5((root / "stl10_binary" / n).read_bytes()).hexdigest()] for n in names]

    monkeypatch.setattr(STL10, "train_list", listed("train_X.bin", "train_y.bin", "unlabeled_X.bin"))
    monkeypatch.setattr(STL10, "test_list", listed("test_X.bin", "test_y.bin"))
    return STL10(str(root), split=split)


def test_stl10_is_read_as_torchvision_reads_it(stl10: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stl10_reader, "CHUNK", 7)
    sets = downstream("stl10", stl10)
    reference = {split: torchvision_stl10(stl10, split, monkeypatch) for split in ("train", "test", "unlabeled")}
    offsets = {"train": ("train", 0), "val": ("train", 0), "test": ("test", COUNTS["train"])}
    for part, (split, offset) in offsets.items():
        images: ImageSet = getattr(sets, part)
        chosen = np.asarray(sets.indices[part]) - offset
        assert np.array_equal(images.images.stacked().numpy(), reference[split].data[chosen])
        assert same_labels(images, np.asarray(reference[split].labels)[chosen])
    assert sorted(sets.indices["train"] + sets.indices["val"]) == list(range(50))
    assert [len(sets.train), len(sets.val), len(sets.test)] == [40, 10, 30]
    assert counts(sets.val) == [1] * 10
    unlabelled = pretext("stl10", stl10)
    assert unlabelled.labels is None
    assert np.array_equal(unlabelled.images.stacked().numpy(), reference["unlabeled"].data)
    few = pretext("stl10", stl10, limit=5)
    assert len(few) == 5
    assert rows(few) < rows(unlabelled)


def test_stl10_capped(stl10: Path) -> None:
    full, few = downstream("stl10", stl10), downstream("stl10", stl10, labels_per_class=2)
    assert few.train.images.stacked().shape == (20, 3, 96, 96)
    assert rows(few.train) < rows(full.train)


def test_stl10_files_that_are_missing_or_cut_short(stl10: Path) -> None:
    (stl10 / "stl10_binary" / "unlabeled_X.bin").unlink()
    assert len(downstream("stl10", stl10).train) == 40
    remedy = r"unlabeled_X\.bin is missing.*stl10_binary\.tar\.gz.*`data\.download`.*`data\.root`"
    with pytest.raises(DataError, match=remedy):
        pretext("stl10", stl10)
    file = stl10 / "stl10_binary" / "test_X.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"test_X\.bin is incomplete: 829,439 bytes instead of 829,440"):
        downstream("stl10", stl10)


def test_stl10_label_out_of_range(stl10: Path) -> None:
    labels = (np.arange(50) % 10 + 1).astype(np.uint8)
    labels[3] = 0
    labels.tofile(stl10 / "stl10_binary" / "train_y.bin")
    with pytest.raises(DataError, match="image 3 has label -1"):
        downstream("stl10", stl10)


def test_stl10_download_only_when_asked_and_needed(stl10: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    def failing(*arguments: object) -> None:
        calls.append(arguments)
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", failing)
    load_pretext("stl10", root=stl10, download=True)
    assert calls == []
    (stl10 / "stl10_binary" / "train_y.bin").unlink()
    with pytest.raises(
        DataError, match=r"train_y\.bin is missing; the download of STL-10 failed.*no network.*unpack it inside"
    ):
        load_downstream("stl10", root=stl10, download=True)
    assert calls == [(STL10.url, stl10, "stl10_binary.tar.gz", STL10.tgz_md5)]


def test_stl10_counts_are_the_published_ones() -> None:
    assert stl10_reader.STL10_COUNTS == {"train": 5000, "test": 8000, "unlabeled": 100000}
