"""Files as arrays: the order of sorted paths, links, what is passed over, and bytes a file."""

from __future__ import annotations

import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes.vision.errors import DataError
from recipes.vision.sources.file_table import FileScan, FileTable

ODD_NAMES = [
    "a.png", "a/1.png", "a/b/2.png", "a-b/3.png", "a b/4.png", "a.b/5.png", "a0/6.png", "A/7.png", "ab/8.png", "Z.png",
    "10.png", "9.png", "a/B.png", "a/b.png", "ä/ö.png", "z/é.png", "日本/語.png", "a!/9.png", "[red]<b>/x.png",
    "c\x1b[2J/y.png", "new\nline/z.png", "~/t.png", "x.PNG/nested.png", "\udcff\udce4.png", "\udce4/\udcfc.png",
    "\U0001f600/s.png",
]  # fmt: skip


def made(root: Path, names: list[str]) -> Path:
    for position, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * position)
    return root


def scanned(root: Path, suffixes: tuple[str, ...] = (".png",)) -> tuple[FileTable, dict[str, int]]:
    scan = FileScan(root, suffixes)
    scan.add_below()
    return scan.table(), dict(scan.passed_over)


def relative(table: FileTable) -> list[str]:
    return [table.relative(i) for i in range(len(table))]


def random_names(seed: int) -> list[str]:
    draw = random.Random(seed)
    parts = ["a", "b", "a-", "a.", "a0", "B", "_", "é", "0", "00", "-"]
    return sorted({"/".join(draw.choices(parts, k=draw.randint(0, 4))).lstrip("/") + f"/{i}.png" for i in range(60)})


@pytest.mark.parametrize("names", [ODD_NAMES, *map(random_names, range(4))], ids=["odd", *map(str, range(4))])
def test_order_is_that_of_sorted_paths(names: list[str], tmp_path: Path) -> None:
    names = [name.lstrip("/") for name in names]
    root = made(tmp_path / "images", names)
    table, passed_over = scanned(root)
    expected = sorted(root / name for name in names)
    assert [Path(table.path(i)) for i in range(len(table))] == expected
    assert relative(table) == [str(path.relative_to(root)) for path in expected]
    assert table.sizes.tolist() == [path.stat().st_size for path in expected]
    assert table.mtimes.tolist() == [path.stat().st_mtime_ns for path in expected]
    assert (table.sizes.dtype, table.mtimes.dtype) == (np.int64, np.int64)
    assert passed_over == {}


@pytest.mark.parametrize("convert", [torch.tensor, np.asarray, lambda chosen: np.asarray(chosen, dtype=np.int32)])
@pytest.mark.parametrize("known", [True, False], ids=["scanned", "of"])
def test_choice_of_files(
    convert: Callable[[list[int]], torch.Tensor | np.ndarray], known: bool, tmp_path: Path
) -> None:
    names = ["a.png", "b/c.png", "b/d.png", "e.png"]
    root = made(tmp_path, names)
    table = scanned(root)[0] if known else FileTable.of(root, names)
    chosen = table.select(convert([3, 1, 1]))
    assert relative(chosen) == ["e.png", "b/c.png", "b/c.png"]
    assert chosen.sizes.tolist() == [3, 1, 1]
    assert chosen.mtimes.tolist() == [(root / name).stat().st_mtime_ns for name in relative(chosen)]
    assert chosen.path(0) == str(root / "e.png")
    assert len(table.select(torch.empty(0, dtype=torch.int64))) == 0


def test_nothing_is_looked_at_before_sizes_are_asked_for(tmp_path: Path) -> None:
    table = FileTable.of(tmp_path, ["a.png", "later.png"])
    assert relative(table) == ["a.png", "later.png"]
    made(tmp_path, ["b.png", "a.png"])
    with pytest.raises(DataError, match=r"later\.png cannot be read \(No such file"):
        _ = table.sizes
    assert table.select(np.asarray([0])).sizes.tolist() == [1]
    assert FileTable.of(tmp_path, []).sizes.tolist() == []


def test_what_is_passed_over_is_counted_by_kind(tmp_path: Path) -> None:
    made(
        tmp_path,
        ["a.png", "b.gif", "c.GIF", "d", "Mr. Smith", "frame.0001", "e.", ".DS_Store", ".git/x.png", "deep/f.txt"],
    )
    (tmp_path / "nowhere").symlink_to("gone")
    (tmp_path / "itself").symlink_to("itself")
    os.mkfifo(tmp_path / "pipe.png")
    table, passed_over = scanned(tmp_path)
    assert relative(table) == ["a.png"]
    expected = {".gif": 2, "no suffix": 4, "hidden": 2, ".txt": 1, "links to nowhere": 2, "not a file": 1}
    assert passed_over == expected


def test_suffixes_in_any_case_and_folders_named_like_files(tmp_path: Path) -> None:
    made(tmp_path, ["a.PNG", "b.Jpg", "c.jpg.png", "d.png.txt", "e.png/f.JPG"])
    assert relative(scanned(tmp_path, (".png", ".jpg"))[0]) == ["a.PNG", "b.Jpg", "c.jpg.png", "e.png/f.JPG"]


def test_links_to_files_and_folders_elsewhere_are_followed(tmp_path: Path) -> None:
    elsewhere = made(tmp_path / "elsewhere", ["x.png", "deep/y.png"])
    root = made(tmp_path / "root", ["a/1.png"])
    (root / "b").symlink_to(elsewhere)
    (root / "c").symlink_to(elsewhere)
    (root / "d.png").symlink_to(elsewhere / "x.png")
    (tmp_path / "link").symlink_to(root)
    expected = ["a/1.png", "b/deep/y.png", "b/x.png", "c/deep/y.png", "c/x.png", "d.png"]
    assert relative(scanned(tmp_path / "link")[0]) == expected


def around(root: Path) -> str:
    (root / "a" / "again").symlink_to(root / "a")
    return "a/again"


def around_root(root: Path) -> str:
    (root / "a" / "again").symlink_to(root)
    return "a/again"


def above_root(root: Path) -> str:
    (root / "a" / "above").symlink_to(root.parent)
    return "a/above"


def two_links(root: Path) -> str:
    other = root.parent / "other"
    other.mkdir()
    (root / "a" / "b").symlink_to(other)
    (other / "c").symlink_to(root / "a")
    return "a/b/c"


def at_the_top(root: Path) -> str:
    (root / "self").symlink_to(".")
    return "self"


@pytest.mark.parametrize("link", [around, around_root, above_root, two_links, at_the_top])
def test_links_to_a_folder_around_them_are_refused(link: Callable[[Path], str], tmp_path: Path) -> None:
    root = made(tmp_path / "root", ["a/1.png"])
    name = link(root)
    with pytest.raises(DataError, match=rf"{root}/{name} links to a folder that it lies in: remove the link"):
        scanned(root)


@pytest.mark.parametrize("target", ["gone.png", "self.png"], ids=["nowhere", "itself"])
def test_images_that_link_to_nowhere_are_named(target: str, tmp_path: Path) -> None:
    (made(tmp_path, ["a/1.png"]) / "a" / "self.png").symlink_to(target)
    with pytest.raises(DataError, match=r"a/self\.png cannot be read \(.*restore the file or remove it"):
        scanned(tmp_path)


def test_folders_one_by_one(tmp_path: Path) -> None:
    made(tmp_path, ["b/1.png", "b/2.png", "a/3.png", "c/4.png"])
    scan = FileScan(tmp_path, [".png"])
    assert [scan.add_below("b"), scan.add_below("a"), len(scan)] == [2, 1, 3]
    assert relative(scan.table()) == ["b/1.png", "b/2.png", "a/3.png"]


def bytes_a_file(build: Callable[[], FileTable], count: int) -> tuple[float, float]:
    """What the table keeps, and what was in use at most while it was made, in bytes a file."""
    tracemalloc.start()
    try:
        table = build()
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(table) == count
    return kept / count, peak / count


def imagenet_name(i: int) -> str:
    return f"train/n{i // 1300:08d}/n{i // 1300:08d}_{i:06d}.JPEG"


def test_a_file_costs_at_most_200_bytes(tmp_path: Path) -> None:
    count, found = 200_000, tmp_path.stat()

    def added() -> FileTable:
        scan = FileScan(tmp_path, [".jpeg"])
        for i in range(count):
            scan.add(imagenet_name(i), found)
        return scan.table()

    for build in (added, lambda: FileTable.of(tmp_path, map(imagenet_name, range(count)))):
        kept, peak = bytes_a_file(build, count)
        assert kept < 100
        assert peak < 200
    table = added()
    assert bytes_a_file(lambda: table.select(torch.arange(count)), count)[1] < 60


@pytest.mark.slow
@pytest.mark.parametrize("flat", [False, True], ids=["class folders", "flat"])
def test_a_million_empty_files(flat: bool, tmp_path: Path) -> None:
    count = 1_000_000
    for i in range(count):
        name = imagenet_name(i)
        if flat:
            name = os.path.basename(name)
        elif i % 1300 == 0:
            (tmp_path / name).parent.mkdir(parents=True)
        os.close(os.open(tmp_path / name, os.O_CREAT | os.O_WRONLY))
    kept, peak = bytes_a_file(lambda: scanned(tmp_path, (".jpeg",))[0], count)
    assert kept < 100
    assert peak < 200
