"""Lists of the images to train on, by path, by the end of a path, or by bare name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipes.vision.errors import DataError
from recipes.vision.sources.file_table import FileTable
from recipes.vision.sources.subset_list import read_subset

NAMES = [
    "train/n01/n01_1.JPEG", "train/n01/n01_2.JPEG", "train/n02/n02_1.JPEG", "val/n01/v.JPEG", "val/n02/v.JPEG",
    "top.png", "é/ü.png",
]  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> FileTable:
    return FileTable.of(tmp_path / "images", NAMES)


def read(tmp_path: Path, files: FileTable, content: str | bytes) -> list[int]:
    (tmp_path / "1percent.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    positions = read_subset(tmp_path / "1percent.txt", files)
    assert positions.dtype == torch.int64
    return positions.tolist()


@pytest.mark.parametrize(
    ("content", "positions"),
    [
        ("train/n01/n01_2.JPEG\ntrain/n02/n02_1.JPEG\n", [1, 2]),
        ("n02_1.JPEG\nn01_1.JPEG", [0, 2]),
        ("n01/n01_2.JPEG\nn01/v.JPEG\n", [1, 3]),
        ("\n  top.png \r\n\r\n./val/n02/v.JPEG\r\n", [4, 5]),
        ("train\\n01\\n01_1.JPEG\n", [0]),
        ("é/ü.png\n", [6]),
        ("\ufeffü.png\ntop.png", [5, 6]),
        ("ü.png\ntop.png".encode("utf-16"), [5, 6]),
        ("top.png\rn02_1.JPEG\r", [2, 5]),
        ("\n".join(reversed(NAMES)), list(range(7))),
    ],
)
def test_lines_name_images(content: str | bytes, positions: list[int], tmp_path: Path, files: FileTable) -> None:
    assert read(tmp_path, files, content) == positions


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("top.png\n\nn03_1.JPEG\n", r"line 3 names n03_1\.JPEG, which is not among the 7 images"),
        ("01_1.JPEG\n", r"line 1 names 01_1\.JPEG, which is not among"),
        ("n01/\n", "line 1 names n01/, which is not among"),
        ("n01_1.JPEG 0\n", r"line 1 names n01_1\.JPEG 0, which is not among"),
        (
            "top.png\nv.JPEG\n",
            r"line 2 names v\.JPEG, which may be val/n01/v\.JPEG or val/n02/v\.JPEG: write its whole",
        ),
        ("top.png\ntop.png\n", r"line 2 names top\.png, as line 1 does"),
        ("n01_1.JPEG\ntop.png\ntrain/n01/n01_1.JPEG\n", r"line 3 names train/.*, which line 1 names as n01_1\.JPEG"),
        ("", "names no image: write one a line"),
        (" \n\n", "names no image"),
        ("top.png\nü.png".encode("latin-1"), "row 2 holds a byte 0xFC"),
    ],
)
def test_lines_that_name_none(content: str | bytes, said: str, tmp_path: Path, files: FileTable) -> None:
    with pytest.raises(DataError, match=said) as raised:
        read(tmp_path, files, content)
    assert str(tmp_path / "1percent.txt") in str(raised.value)


def test_whole_path_goes_before_the_end_of_another(tmp_path: Path) -> None:
    files = FileTable.of(tmp_path, ["copy/a.png", "a.png", "copy/b.png"])
    assert read(tmp_path, files, "a.png\nb.png") == [1, 2]


def test_choice_of_a_table_counts_its_own_positions(tmp_path: Path, files: FileTable) -> None:
    assert read(tmp_path, files.select(torch.tensor([5, 3, 1])), "v.JPEG\nn01_2.JPEG\n") == [1, 2]


def test_list_that_is_missing(tmp_path: Path, files: FileTable) -> None:
    with pytest.raises(DataError, match=r"10percent\.txt cannot be read \(No such file"):
        read_subset(tmp_path / "10percent.txt", files)
