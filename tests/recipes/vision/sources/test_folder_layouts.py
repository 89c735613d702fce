"""What folders stand for: classes, parts under any name, or nothing; and what of them is passed over."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.vision.errors import DataError
from recipes.vision.sources.folders import (
    SUFFIXES,
    FolderListing,
    list_folder,
    list_images,
    part_of,
    passed_over_words,
)
from recipes.vision.sources.sources import open_images
from tests.support.recipes.image_trees import counts, downstream, pretext, rows, tree


def empty(root: Path, names: list[str]) -> Path:
    """Files of these names without content: listings do not read them."""
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return root


def names(listing: FolderListing, part: str | None = None) -> list[str]:
    files = listing.files if part is None else listing.files.select(listing.parts[part])
    return [files.relative(i) for i in range(len(files))]


def pairs(*tops: str, inner: tuple[str, ...] = ("cat", "dog")) -> list[str]:
    return [f"{top}/{name}/{i}.png" for top in tops for name in inner for i in range(2)]


@pytest.mark.parametrize("suffix", [*sorted(SUFFIXES), ".JPG", ".Tif", ".JFIF"])
def test_accepted_suffixes(suffix: str, tmp_path: Path) -> None:
    listing = list_folder(empty(tmp_path, [f"a/1{suffix}", "a/2.png", f"b/3{suffix}"]))
    assert names(listing) == [f"a/1{suffix}", "a/2.png", f"b/3{suffix}"]
    assert not listing.passed_over


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Training", None, "Testing"),
        ("training", "validation", "testing"),
        ("TRAIN", "Valid", None),
        ("Train", "dev", "TEST"),
        ("train", "VAL", "Test"),
        ("Training", None, None),
    ],
)
def test_split_folders_under_other_names(train: str, val: str | None, test: str | None, tmp_path: Path) -> None:
    parts = {part: name for part, name in (("train", train), ("val", val), ("test", test)) if name is not None}
    listing = list_folder(empty(tmp_path, pairs(*parts.values())))
    assert listing.classes == ("cat", "dog")
    assert list(listing.parts) == list(parts)
    assert listing.labels is not None
    for part, name in parts.items():
        assert names(listing, part) == pairs(name)
        assert listing.labels[listing.parts[part]].tolist() == [0, 0, 1, 1]
    assert listing.labels.dtype == torch.int64
    assert sorted(torch.cat(list(listing.parts.values())).tolist()) == list(range(len(listing.files)))


def test_other_names_give_the_split_of_the_plain_ones(tmp_path: Path) -> None:
    for root, train, test in ((tmp_path / "a", "train", "test"), (tmp_path / "b", "Training", "Testing")):
        tree(root / train, {"cat": 10, "dog": 10})
        tree(root / test, {"cat": 3, "dog": 2}, seed=1)
    plain, other = (downstream(f"folder:{tmp_path / name}") for name in "ab")
    assert other.indices == plain.indices
    assert counts(other.test) == [3, 2]
    assert rows(other.test) == rows(plain.test)
    assert not rows(pretext(f"folder:{tmp_path / 'b'}")) & rows(other.test)


@pytest.mark.parametrize(
    ("tops", "said"),
    [
        (["train", "val", "validation"], "val and .*validation both mean the val part"),
        (["Training", "train", "test"], "Training and .*train both mean the train part"),
        (["train", "test", "Test"], "both mean the test part"),
        (["train", "testing", "test"], "both mean the test part"),
        (["train", "val", "extra"], "extra is neither train, val nor test: rename it"),
    ],
)
def test_parts_that_are_named_twice_or_not_known(tops: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        list_folder(empty(tmp_path, pairs(*tops)))


def lacking(*tops: str) -> list[str]:
    """The first part has three classes, the others lack one of them."""
    return pairs(tops[0], inner=("cat", "dog", "elk")) + pairs(*tops[1:])


@pytest.mark.parametrize(
    "files",
    [
        pairs("part1", "part2"),
        pairs("test", "val"),
        pairs("fold_0", "fold_1", "fold_2"),
        pairs("entrainement", "essai"),
        [*pairs("Learn"), *pairs("Evaluate", inner=("Cat", "DOG"))],
        pairs("one", "two", inner=("cat",)),
        lacking("big", "small"),
        [*pairs("part1", "part2"), "part1/stray.png"],
        pairs("amazon/images", "dslr/images"),
        pairs("bottle", "cable", inner=("train", "test")),
        [*pairs("seg_train/seg_train", "seg_test/seg_test"), "seg_pred/seg_pred/1.png"],
        [*pairs("learn/a/b"), *pairs("check"), "check/deep/x/1.png"],
    ],
)
def test_folders_of_the_same_subfolders_are_no_classes(files: list[str], tmp_path: Path) -> None:
    remedy = (
        r"hold the same subfolders \(.*\).*rename them to train, val and test; if they are the classes.*labels\.csv"
    )
    with pytest.raises(DataError, match=remedy):
        downstream(f"folder:{empty(tmp_path, files)}")


@pytest.mark.parametrize(
    "files",
    [
        [*pairs("cat", "dog", inner=("images",))],
        [*pairs("cat", "dog", inner=("old", "new")), "cat/1.png", "dog/2.png"],
        [*pairs("benign/SOB", inner=("adenosis", "tubular")), *pairs("malignant/SOB", inner=("ductal", "lobular"))],
        [*pairs("cat", inner=("patient1", "patient2")), *pairs("dog", inner=("patient2", "patient3"))],
        [*pairs("cat"), "dog/1.png"],
        [*pairs("crane", inner=("bird", "machine")), *pairs("kite", inner=("bird", "toy")), "elk/1.png", "fox/2.png"],
        [*pairs("crane", "kite", inner=("bird", "machine")), "elk/1.png", "fox/2.png", "gnu/3.png"],
        ["cat/1.png", "cat/old/2.png", "dog/old/3.png"],
        ["cat/1.png", "dog/2.png"],
        ["train/1.png", "plane/2.png"],
    ],
)
def test_classes_with_folders_inside(files: list[str], tmp_path: Path) -> None:
    listing = list_folder(empty(tmp_path, files))
    assert set(listing.classes) == {name.split("/")[0] for name in files}
    assert names(listing) == [str(path.relative_to(tmp_path)) for path in sorted(tmp_path / name for name in files)]


@pytest.mark.parametrize(
    ("files", "deeper", "inside"),
    [
        (pairs("set"), "set", "cat, dog"),
        (pairs("set/train", "set/test"), "set", "test, train"),
        (pairs("download/set"), "download/set", "cat, dog"),
        ([*pairs("set"), "set/loose.png"], "set", "cat, dog"),
        ([f"set/{i}/1.png" for i in range(7)], "set", "0, 1, 2, 3, 4 and 2 more"),
    ],
)
def test_a_path_that_is_a_level_too_high(files: list[str], deeper: str, inside: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        downstream(f"folder:{empty(tmp_path, files)}")
    assert "has a single class folder" in str(raised.value)
    assert f"{tmp_path / deeper} holds several folders with images ({inside})" in str(raised.value)
    assert str(raised.value).endswith(f"give folder:{tmp_path / deeper}")


@pytest.mark.parametrize(
    "files", [["cat/1.png", "cat/2.png"], ["cat/deep/1.png"], pairs("train", "test", inner=("cat",))]
)
def test_a_single_class(files: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has a single class folder, cat, .*; add a folder with the images of another"):
        downstream(f"folder:{empty(tmp_path, files)}")


UNLABELLED = {
    "flat": ["1.png", "2.jpg", "3.tif"],
    "one folder": ["all/1.png", "all/2.png"],
    "a folder a patient": ["p1/a.png", "p2/b.png", "p3/c.png"],
    "a folder a video": ["v1/000.png", "v1/001.png", "v2/000.png"],
    "deep and mixed": ["1.png", "a/2.png", "a/b/c/3.png", "d/4.png"],
    "class folders": pairs("cat", "dog")[:4],
    "split folders": pairs("train", "test"),
    "same subfolders": pairs("part1", "part2"),
}


@pytest.mark.parametrize("layout", UNLABELLED)
def test_unlabelled_images_at_any_depth(layout: str, tmp_path: Path) -> None:
    files = UNLABELLED[layout]
    listing = list_images(empty(tmp_path, [*files, "notes.txt", ".hidden/x.png"]))
    assert names(listing, "unlabelled") == [str(p.relative_to(tmp_path)) for p in sorted(tmp_path / f for f in files)]
    assert (listing.labels, listing.classes, list(listing.parts)) == (None, (), ["unlabelled"])
    assert listing.passed_over == {".txt": 1, "hidden": 1}


def test_unlabelled_images_are_all_taken(tmp_path: Path) -> None:
    tree(tmp_path, {"p1": 1, "p2": 2, "p3": 1})
    source = open_images(str(tmp_path))
    assert (source.labels, source.parts["unlabelled"].tolist()) == (None, [0, 1, 2, 3])
    files = sorted(tmp_path.rglob("*.png"))
    for position, file in enumerate(files):
        expected = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
        assert torch.equal(source.images.at(position), expected)


@pytest.mark.parametrize("folder", ["", "all", "all/deeper"], ids=["flat", "all", "all/deeper"])
def test_pretext_images_without_class_folders(folder: str, tmp_path: Path) -> None:
    tree(tmp_path / "a", {"x": 6})
    (tmp_path / "b" / folder).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "a" / "x").rename(tmp_path / "b" / folder)
    images = pretext(f"folder:{tmp_path / 'b'}", evaluated=False)
    assert (len(images), images.labels) == (6, None)
    assert len(pretext(f"folder:{tmp_path / 'b'}", limit=4, evaluated=False)) == 4


def test_class_folders_lose_their_test_images_only_where_they_are_evaluated(tmp_path: Path) -> None:
    source = f"folder:{tree(tmp_path, {'cat': 8, 'dog': 8})}"
    sets = downstream(source)
    assert rows(pretext(source)) == rows(sets.train) | rows(sets.val)
    assert len(rows(pretext(source, evaluated=False))) == 16


def test_unlabelled_folder_without_images(tmp_path: Path) -> None:
    empty(tmp_path, ["a/1.gif", "b/2", "c.txt"])
    with pytest.raises(
        DataError, match=r"holds no image \(.*\.webp\); passed over 3 files \(\.gif 1, \.txt 1, no suffix 1\)"
    ):
        list_images(tmp_path)
    with pytest.raises(DataError, match=r"no folder .*nowhere"):
        list_images(tmp_path / "nowhere")


def test_files_passed_over_are_counted_in_one_line(tmp_path: Path) -> None:
    files = ["a/1.png", "b/1.png", "a/2.gif", "b/3.GIF", "a/deep/4.gif", "a/noname", "b/noname", "top.png", "more.jpg"]
    empty(tmp_path, [*files, "readme.md", "a/.DS_Store"])
    (tmp_path / "c").symlink_to("unmounted")
    assert passed_over_words(list_folder(tmp_path).passed_over) == (
        "passed over 10 files "
        "(.gif 3, no suffix 2, pictures beside class folders 2, .md 1, hidden 1, links to nowhere 1)"
    )
    assert passed_over_words(list_folder(empty(tmp_path / "clean", ["a/1.png", "b/2.png"])).passed_over) == ""


def test_pictures_beside_class_folders_of_parts_are_counted(tmp_path: Path) -> None:
    empty(tmp_path, [*pairs("train", "Test"), "train/loose.png", "Test/loose.jpg", "top.bmp", "Test/notes.txt"])
    assert list_folder(tmp_path).passed_over == {"pictures beside class folders": 3, ".txt": 1}


def test_words_for_what_is_passed_over() -> None:
    assert passed_over_words(Counter()) == ""
    assert passed_over_words(Counter({".gif": 1})) == "passed over 1 file (.gif 1)"
    many = Counter({f".x{i}": 10 - i for i in range(9)})
    assert passed_over_words(many) == "passed over 54 files (.x0 10, .x1 9, .x2 8, .x3 7, .x4 6, .x5 5, others 9)"
    assert passed_over_words(Counter({".gif": 12_345})) == "passed over 12,345 files (.gif 12,345)"


@pytest.mark.parametrize(
    "options", [{}, {"labels_per_class": 30}, {"val_per_class": 30}], ids=["split", "train", "val"]
)
def test_too_few_images_tell_what_was_passed_over(options: dict[str, Any], tmp_path: Path) -> None:
    tree(tmp_path, {"cat": 8, "dog": 8 if options else 2})
    empty(tmp_path, [f"dog/{i}.gif" for i in range(40)])
    with pytest.raises(DataError, match=r"too few images .*passed over 40 files \(\.gif 40\)"):
        downstream(f"folder:{tmp_path}", **options)


def test_empty_class_folder_tells_what_was_passed_over_there(tmp_path: Path) -> None:
    empty(tmp_path, ["cat/1.png", "cat/1.txt", "dog/1.gif", "dog/2.gif", "dog/3"])
    with pytest.raises(DataError, match=r"dog holds no image .*passed over 3 files \(\.gif 2, no suffix 1\)$"):
        list_folder(tmp_path)


def test_words_for_parts() -> None:
    said = {name: part_of(name) for name in ("TRAIN", "Training", "validation", "Dev", "tests", "testing", "eval", "")}
    expected = {"TRAIN": "train", "Training": "train", "validation": "val", "Dev": "val", "testing": "test"}
    assert said == {"tests": None, "eval": None, "": None} | expected


def test_listing_keeps_the_order_of_sorted_paths(tmp_path: Path) -> None:
    odd = ["a/2.png", "a-b/1.png", "a b/1.png", "A/1.png", "a/b/1.png", "a/b-c/1.png", "a/10.png", "é/1.png"]
    listing = list_folder(empty(tmp_path, odd))
    assert [Path(listing.files.path(i)) for i in range(len(odd))] == sorted(tmp_path / name for name in odd)
    assert listing.labels is not None
    assert [listing.classes[i] for i in listing.labels] == [name.split("/")[0] for name in names(listing)]
    assert np.array_equal(listing.files.sizes, np.zeros(len(odd)))
