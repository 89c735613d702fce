"""Pictures read into memory: in order by one thread or more, and of any sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from recipes.vision.errors import DataError
from recipes.vision.pictures import memory
from recipes.vision.pictures.files import FileImages
from recipes.vision.pictures.memory import ArrayImages, PackedImages, packed, read_all
from recipes.vision.sources.file_table import FileTable
from tests.support.recipes.image_trees import picture


def files(root: Path, sizes: list[tuple[int, int]]) -> FileImages:
    for i, (width, height) in enumerate(sizes):
        picture(i, width, height).save(root / f"{i}.png")
    return FileImages(FileTable.of(root, [f"{i}.png" for i in range(len(sizes))]))


@pytest.mark.parametrize("sizes", [[(20, 20)] * 11, [(i + 1, 30 - i) for i in range(11)]], ids=["one size", "any"])
@pytest.mark.parametrize("threshold", [0, 10**9], ids=["threads", "one thread"])
def test_reading_in_chunks_keeps_the_order(
    sizes: list[tuple[int, int]], threshold: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "CHUNK", 3)
    monkeypatch.setattr(memory, "SMALL_FILE", threshold)
    images = files(tmp_path, sizes)
    held = read_all(images)
    assert held.in_memory
    assert len(held) == len(images) == 11
    for i, (width, height) in enumerate(sizes):
        expected = torch.from_numpy(np.array(picture(i, width, height))).permute(2, 0, 1)
        assert torch.equal(held.at(i), expected)
        assert torch.equal(images.at(i), expected)
    chosen = held.subset(torch.tensor([7, 0, 7]))
    assert [torch.equal(chosen.at(i), held.at(p)) for i, p in enumerate((7, 0, 7))] == [True] * 3
    assert read_all(held) is held


def test_pictures_of_one_size_are_one_tensor(tmp_path: Path) -> None:
    held = read_all(files(tmp_path, [(8, 5)] * 4))
    assert held.array is not None
    assert held.array.shape == (4, 3, 5, 8)
    assert torch.equal(held.array[2], held.at(2))
    assert held.subset(torch.tensor([1, 0])).array is None
    assert read_all(files(tmp_path, [(8, 5), (5, 8)])).array is None
    assert held.nbytes == 4 * 3 * 5 * 8


def test_no_pictures_and_a_missing_one(tmp_path: Path) -> None:
    assert len(packed([])) == 0
    assert isinstance(packed([torch.zeros(1, 2, 3, dtype=torch.uint8)]), PackedImages)
    images = files(tmp_path, [(4, 4)] * 3)
    assert images.nbytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    (tmp_path / "1.png").unlink()
    with pytest.raises(DataError, match=r"1\.png cannot be read \(No such file.*put it back"):
        read_all(images)
    pixels = torch.arange(12, dtype=torch.uint8).view(3, 1, 2, 2)
    assert torch.equal(ArrayImages(pixels).subset(torch.tensor([2, 0])).stacked(), pixels[[2, 0]])
