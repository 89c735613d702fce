"""Copies of pictures are found by their bytes, under whatever names, and leave the pretext set."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.vision.errors import DataError
from recipes.vision.imagesets import DownstreamSets, ImageSet
from recipes.vision.pictures.base import END
from recipes.vision.pictures.files import FileImages, FileItem
from recipes.vision.pictures.memory import ArrayImages
from recipes.vision.record.contents import Contents
from recipes.vision.record.copies import copies, copies_between, labels_of_copies, without_copies
from recipes.vision.sources.file_table import FileTable
from recipes.vision.sources.loading import load_downstream, load_pretext
from tests.recipes.vision.sources.foreign.test_web_dataset import samples, shard
from tests.support.recipes.image_trees import tree


def link(source: Path, target: Path) -> None:
    target.symlink_to(source)


def hard_link(source: Path, target: Path) -> None:
    os.link(source, target)


def copy(source: Path, target: Path) -> None:
    shutil.copy(source, target)


def load(folder: Path, labelled: Path, storage: Any = "stream") -> tuple[ImageSet, DownstreamSets]:
    options: dict[str, Any] = {"root": folder, "download": False, "storage": storage}
    pretext = load_pretext(f"folder:{folder}", evaluated=False, **options)
    return pretext, load_downstream(f"folder:{labelled}", **options)


def name(images: ImageSet, position: int) -> str:
    origin = images.images.origin
    assert isinstance(origin, FileImages)
    return origin.file_name(position)


@pytest.mark.parametrize("storage", ["stream", "memory"])
@pytest.mark.parametrize("made", [copy, link, hard_link])
def test_copies_of_test_images_under_other_names_are_left_out(
    tmp_path: Path, made: Callable[[Path, Path], None], storage: Any
) -> None:
    labelled = tree(tmp_path / "labelled", {"a": 8, "b": 8})
    flat = tree(tmp_path / "flat", {"": 10}, seed=7)
    pretext, sets = load(flat, labelled, storage)
    for number in range(3):
        made(labelled / name(sets.test, number), flat / f"else-{number}.png")
    for number in range(2):
        made(labelled / name(sets.val, number), flat / f"val-{number}.png")
    made(labelled / name(sets.train, 0), flat / "train.png")
    pretext, sets = load(flat, labelled, storage)
    assert len(pretext) == 16
    kept, found = without_copies(pretext, sets)
    assert found == {"test": 3, "val": 2}
    names = [name(kept, position) for position in range(len(kept))]
    assert names == sorted([f"{i:03d}.png" for i in range(10)] + ["train.png", "val-0.png", "val-1.png"])
    assert torch.equal(kept.images.at(3), FileItem(str(flat / "003.png")).picture())


def test_two_folders_with_the_same_pictures_leave_no_test_image(tmp_path: Path) -> None:
    labelled = tree(tmp_path / "labelled", {"a": 8, "b": 8})
    shutil.copytree(labelled, tmp_path / "same")
    pretext, sets = load(tmp_path / "same", labelled)
    kept, found = without_copies(pretext, sets)
    assert found == {"test": len(sets.test), "val": len(sets.val)}
    assert len(kept) == 16 - len(sets.test)


def raw(folder: Path, contents: dict[str, bytes]) -> FileImages:
    folder.mkdir()
    for file, content in contents.items():
        (folder / file).write_bytes(content)
    return FileImages(FileTable.of(folder, sorted(contents)))


LONG = bytes(range(256)) * (END // 64)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (LONG, True),
        (LONG[:-1], False),
        (LONG[:-1] + b"\0", False),
        (b"\1" + LONG[1:], False),
        (LONG[: len(LONG) // 2] + b"\0" + LONG[len(LONG) // 2 + 1 :], True),
        (LONG[: len(LONG) // 2 + 1] + b"\0" + LONG[len(LONG) // 2 + 2 :], False),
    ],
)
def test_the_whole_content_decides(tmp_path: Path, other: bytes, same: bool) -> None:
    one = raw(tmp_path / "one", {"x": LONG, "y": b"short"})
    two = raw(tmp_path / "two", {"u": b"SHORT", "v": other, "w": b"short"})
    assert copies(one, two).tolist() == [same, True]
    assert copies(two, one).tolist() == [False, same, True]


def test_only_files_of_equal_size_and_ends_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    middle = LONG[: END + 1] + b"!" + LONG[END + 2 :]
    one = raw(tmp_path / "one", {"a": LONG, "b": LONG[:-1] + b"!", "c": b"!" * 9, "d": middle})
    two = raw(tmp_path / "two", {"a": LONG})
    ends, whole = list[str](), list[str]()
    real_ends, real_content = FileItem.ends, FileItem.content
    monkeypatch.setattr(FileItem, "ends", lambda item: (ends.append(item.name), real_ends(item))[1])
    monkeypatch.setattr(FileItem, "content", lambda item: (whole.append(item.name), real_content(item))[1])
    assert copies(one, two).tolist() == [True, False, False, False]
    assert sorted(map(os.path.basename, ends)) == ["a", "a", "b", "d"]
    assert sorted(map(os.path.basename, whole)) == ["a", "a", "d"]


def test_members_of_shards_are_compared_with_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    labelled = tree(tmp_path / "labelled", {"a": 8, "b": 8})
    _, sets = load(labelled, labelled)
    content = (labelled / name(sets.test, 1)).read_bytes()
    (tmp_path / "shards").mkdir()
    shard(tmp_path / "shards" / "0.tar", [*samples([0, 1, 0, 1]), ("other.png", content), ("other.cls", b"1")])
    source = f"webdataset:{tmp_path}/shards/*.tar"
    pretext = load_pretext(source, root=tmp_path, download=False, evaluated=False, storage="stream")
    kept, found = without_copies(pretext, sets)
    assert found == {"test": 1, "val": 0}
    assert len(kept) == 4


def noise(count: int, seed: int, side: int = 4) -> torch.Tensor:
    shape = (count, 1, side, side)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def array_sets(pixels: torch.Tensor) -> DownstreamSets:
    whole = ImageSet(pixels, torch.arange(len(pixels)) % 2, ("a", "b"), "noise")
    parts = {"train": list(range(6)), "val": list(range(6, 8)), "test": list(range(8, len(pixels)))}
    train, val, test = (whole.subset(rows) for rows in parts.values())
    return DownstreamSets(train, val, test, parts)


def test_arrays_are_compared_by_pixels() -> None:
    pixels, others = noise(12, 0), noise(9, 1)
    others[4], others[6], others[8] = pixels[9], pixels[7], pixels[0]
    kept, found = without_copies(ImageSet(others, None, (), "others"), array_sets(pixels))
    assert found == {"test": 1, "val": 1}
    assert torch.equal(kept.images.stacked(), others[[0, 1, 2, 3, 5, 6, 7, 8]])
    # The same bytes at another shape are another picture.
    assert not copies(
        ImageSet(pixels.view(12, 1, 2, 8), None, (), "").images, ImageSet(pixels, None, (), "").images
    ).any()


def test_nothing_but_copies_is_refused() -> None:
    pixels = noise(12, 0)
    with pytest.raises(DataError, match="every one of the 3 pretext images is a copy of a test image"):
        without_copies(ImageSet(pixels[9:12], None, (), "others"), array_sets(pixels))


def test_copies_between_labelled_sets_are_counted(tmp_path: Path) -> None:
    pixels = noise(12, 0)
    pixels[7], pixels[8], pixels[9], pixels[11] = pixels[1], pixels[1], pixels[6], pixels[2]
    sets = array_sets(pixels)
    contents = {part: Contents(getattr(sets, part).images) for part in ("train", "val", "test")}
    for one in contents.values():
        one.complete(lambda line: None, "images")
    assert copies_between(contents) == {"train and val": 1, "train and test": 2, "val and test": 2}


def test_sizes_that_nobody_knows_may_be_any(tmp_path: Path) -> None:
    class Unknown(FileImages):
        @property
        def file_sizes(self) -> Any:
            return super().file_sizes * 0 - 1

    one = raw(tmp_path / "one", {"x": LONG, "y": b"short"})
    two = raw(tmp_path / "two", {"u": b"SHORT", "w": LONG})
    assert copies(Unknown(one.files), two).tolist() == [True, False]
    assert copies(one, Unknown(two.files)).tolist() == [True, False]


def test_labels_of_copies_are_those_of_the_others() -> None:
    pixels = noise(5, 0)
    own, others = (Contents(ArrayImages(pixels[rows])) for rows in ([0, 1, 2, 3], [3, 1, 4]))
    for contents in (own, others):
        contents.complete(lambda line: None, "images")
    assert labels_of_copies(own, others, torch.tensor([7, 5, 6])).tolist() == [-1, 5, -1, 7]
