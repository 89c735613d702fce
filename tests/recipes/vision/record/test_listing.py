"""The record of a run's images: what it takes for a change and what not, and what it costs."""

from __future__ import annotations

import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recipes.vision.errors import DataError
from recipes.vision.imagesets import DownstreamSets, ImageSet
from recipes.vision.pictures.files import FileImages
from recipes.vision.pictures.memory import read_all
from recipes.vision.record import contents
from recipes.vision.record.identity import Identity
from recipes.vision.record.listing import Record
from recipes.vision.sources.file_table import FileTable
from recipes.vision.sources.loading import load_downstream, load_pretext
from tests.recipes.vision.sources.foreign.test_web_dataset import samples, shard
from tests.support.recipes.image_trees import picture, tree

Sets = dict[str, ImageSet]
SIZES = {"a": 8, "b": 8}
LATER = 3_000_000_000_000


def quiet(line: str) -> None:
    raise AssertionError(line)


def folder_sets(root: Path, storage: Any = "stream", source: str | None = None) -> Sets:
    source = f"folder:{root}" if source is None else source
    options: dict[str, Any] = {"root": root, "download": False, "storage": storage}
    sets = load_downstream(source, **options)
    return {"pretext": load_pretext(source, **options), "train": sets.train, "val": sets.val, "test": sets.test}


def images(folder: Path) -> Path:
    """Two class folders; one file ends in a byte that no decoder looks at."""
    root = tree(folder / "images", SIZES)
    with (root / "b" / "002.png").open("ab") as file:
        file.write(b"0")
    return root


def identity(sets: Sets) -> Identity:
    return Identity(sets.__getitem__)


def recorded(sets: Sets, path: Path) -> Path:
    """The record of a run that has read all its files."""
    one = identity(sets)
    one.check(None, quiet)
    pretext = one.contents("pretext")
    pretext.look(np.flatnonzero(~pretext.known).tolist())
    one.keep(path)
    return path


def change(sets: Sets, path: Path) -> str:
    """What a run that is continued with these sets is told."""
    before = path.read_bytes()
    with pytest.raises(DataError, match="images of this run changed") as caught:
        identity(sets).check(path, quiet)
    assert path.read_bytes() == before
    return str(caught.value)


def add(root: Path) -> None:
    picture(90_000).save(root / "a" / "more.png")


def remove(root: Path) -> None:
    (root / "a" / "003.png").unlink()


def replace_by_larger(root: Path) -> None:
    picture(90_001, 40, 40).save(root / "b" / "002.png")


def replace_bytes(root: Path) -> None:
    """Of the same size."""
    path = root / "b" / "002.png"
    path.write_bytes(path.read_bytes()[:-1] + b"1")
    os.utime(path, ns=(LATER, LATER))


def swap(root: Path) -> None:
    """Two files of two classes: the same names, the same contents at other names."""
    one, other, away = root / "a" / "001.png", root / "b" / "001.png", root / "away"
    one.rename(away)
    other.rename(one)
    away.rename(other)


def rename_class(root: Path) -> None:
    (root / "b").rename(root / "c")


@pytest.mark.parametrize("storage", ["stream", "memory"])
@pytest.mark.parametrize(
    ("tamper", "told"),
    [
        (add, ["added (a/more.png)"]),
        (remove, ["removed (a/003.png)"]),
        (replace_by_larger, ["1 of another size (b/002.png)"]),
        (replace_bytes, ["1 of another content (b/002.png)"]),
        (swap, ["a/001.png, b/001.png"]),
        (rename_class, ["8 removed (b/000.png, b/001.png, b/002.png, b/003.png, b/004.png and 3 more)", "8 added (c/"]),
    ],
)
def test_what_changed_is_named(tmp_path: Path, tamper: Callable[[Path], None], told: list[str], storage: Any) -> None:
    root = images(tmp_path)
    path = recorded(folder_sets(root, storage), tmp_path / "images.npz")
    tamper(root)
    message = change(folder_sets(root, storage), path)
    labelled = message.partition("labelled: ")[2]
    for words in told:
        assert words in labelled, message
    assert "--overwrite" in message


def touch(root: Path) -> Path:
    for path in root.rglob("*.png"):
        os.utime(path, ns=(LATER, LATER))
    return root


def copied(root: Path) -> Path:
    return shutil.copytree(root, root.with_name("copy"), copy_function=shutil.copy)


def linked(root: Path) -> Path:
    other = root.with_name("links")
    for path in root.rglob("*.png"):
        (other / path.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
        (other / path.relative_to(root)).symlink_to(path)
    return other


def itself(root: Path) -> Path:
    return root


@pytest.mark.parametrize("storage", ["stream", "memory"])
@pytest.mark.parametrize("moved", [itself, touch, copied, linked])
def test_the_same_pictures_elsewhere_or_of_another_time_are_the_same(
    tmp_path: Path, moved: Callable[[Path], Path], storage: Any
) -> None:
    root = images(tmp_path)
    first = folder_sets(root, storage)
    path = recorded(first, tmp_path / "images.npz")
    second = folder_sets(moved(root), storage)
    identity(second).check(path, quiet)
    assert identity(first).pretext == identity(second).pretext
    assert identity(first).labelled == identity(second).labelled


def test_only_files_of_another_time_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = images(tmp_path)
    path = recorded(folder_sets(root), tmp_path / "images.npz")
    read: list[bytes] = []
    real = contents.digest
    monkeypatch.setattr(contents, "digest", lambda content: (read.append(content), real(content))[1])
    identity(folder_sets(root)).check(path, quiet)
    assert not read
    touched = root / "a" / "001.png"
    os.utime(touched, ns=(LATER, LATER))
    identity(folder_sets(root)).check(path, quiet)
    # A pretext or training image, or both; never another one.
    assert read
    assert set(read) == {touched.read_bytes()}


def test_pretext_files_that_nobody_has_read_yet_are_compared_by_name_and_size(tmp_path: Path) -> None:
    flat, labelled = tmp_path / "flat", images(tmp_path)
    tree(flat, {"x": 6}, seed=3)
    sets = folder_sets(labelled)
    sets["pretext"] = load_pretext(f"folder:{flat}", root=tmp_path, download=False, evaluated=False, storage="stream")
    one = identity(sets)
    one.check(None, quiet)
    one.keep(tmp_path / "images.npz")
    record = Record.load(tmp_path / "images.npz")
    assert record is not None
    assert not record.listings["pretext"].known.any()
    assert record.listings["train"].known.all()
    # Read for training: the record grows.
    one.contents("pretext").look([2])
    one.update()
    record = Record.load(tmp_path / "images.npz")
    assert record is not None
    assert record.listings["pretext"].known.tolist() == [False, False, True, False, False, False]
    (flat / "x" / "004.png").unlink()
    sets["pretext"] = load_pretext(f"folder:{flat}", root=tmp_path, download=False, evaluated=False, storage="stream")
    assert "pretext: 1 removed (x/004.png)" in change(sets, tmp_path / "images.npz")


def test_another_label_is_a_change_and_another_line_order_too(tmp_path: Path) -> None:
    root = tree(tmp_path / "images", {"x": 12})
    rows = [f"x/{i:03d}.png,{'cat' if i % 2 else 'dog'},{('train', 'val', 'test')[i % 3]}" for i in range(12)]
    write = root / "labels.csv"
    write.write_text("\n".join(["file,label,split", *rows]))
    path = recorded(folder_sets(root), tmp_path / "images.npz")
    write.write_text("\n".join(["file,label,split", *rows[:3], rows[3].replace("cat", "dog"), *rows[4:]]))
    assert "labelled: 1 with another label (x/003.png)" in change(folder_sets(root), path)
    write.write_text("\n".join(["file,label,split", *rows]).replace("dog", "wolf"))
    assert "labelled: 6 with another label" in change(folder_sets(root), path)
    write.write_text("\n".join(["file,label,split", *rows[:4], rows[4].replace("val", "test"), *rows[5:]]))
    assert "labelled: 1 in another set (val before, test now) (x/004.png)" in change(folder_sets(root), path)
    write.write_text("\n".join(["file,label,split", *reversed(rows)]))
    assert "labelled: the same files in another order" in change(folder_sets(root), path)


def arrays(**changed: Any) -> Sets:
    """Two classes of noise, without files."""
    pixels = torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 2
    for place, value in changed.get("pixels", {}).items():
        pixels[place] = value
    for place, value in changed.get("labels", {}).items():
        labels[place] = value
    whole = ImageSet(pixels, labels, changed.get("classes", ("a", "b")), "noise")
    parts = {"train": slice(0, 10), "val": slice(10, 14), "test": slice(14, changed.get("count", 20))}
    sets = {part: whole.subset(torch.arange(20)[rows]) for part, rows in parts.items()}
    return {"pretext": whole.subset(range(14)).unlabelled(), **sets}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"pixels": {(3, 0, 0, 0): 7}}, ["pretext: other pixels", "labelled: other pixels", "(train; "]),
        ({"pixels": {(15, 0, 1, 2): 7}}, ["labelled: other pixels", "(test; "]),
        ({"labels": {11: 0}}, ["labelled: ", "(val; "]),
        ({"classes": ("a", "c")}, ["labelled: ", "(train, val, test; "]),
        ({"count": 19}, ["6 before and 5 now"]),
    ],
)
def test_arrays_are_compared_as_a_whole(tmp_path: Path, changed: dict[str, Any], told: list[str]) -> None:
    path = recorded(arrays(), tmp_path / "images.npz")
    identity(arrays()).check(path, quiet)
    message = change(arrays(**changed), path)
    for words in told:
        assert words in message
    assert identity(arrays(**changed)).labelled != identity(arrays()).labelled


def shard_sets(root: Path) -> Sets:
    return folder_sets(root, source=f"webdataset:{root}/*.tar")


def test_members_of_shards_are_listed_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root, files = tmp_path / "shards", samples([0, 1] * 8)
    shard(root / "0.tar", files[:16])
    shard(root / "1.tar", files[16:])
    path = recorded(shard_sets(root), tmp_path / "images.npz")
    identity(shard_sets(root)).check(path, quiet)
    os.utime(root / "1.tar", ns=(LATER, LATER))
    identity(shard_sets(root)).check(path, quiet)
    content = bytearray(files[16][1])
    content[60] ^= 1
    shard(root / "1.tar", [(files[16][0], bytes(content)), *files[17:]])
    assert "1 of another content (1.tar: 000008.png)" in change(shard_sets(root), path)
    shard(root / "1.tar", files[16:-2])
    assert "removed (1.tar: 000015.png)" in change(shard_sets(root), path)


@pytest.mark.parametrize("damage", [b"", b"PK", b"no archive", None])
def test_a_damaged_record_is_named(tmp_path: Path, damage: bytes | None) -> None:
    path = recorded(arrays(), tmp_path / "images.npz")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage is None else damage)
    with pytest.raises(DataError, match=r"images\.npz cannot be read .* --overwrite"):
        identity(arrays()).check(path, quiet)


def test_a_missing_record_and_other_versions_are_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    identity(arrays()).check(tmp_path / "images.npz", said.append)
    assert len(said) == 1
    assert "images.npz is missing" in said[0]
    path = recorded(arrays(), tmp_path / "images.npz")
    monkeypatch.setattr(torch, "__version__", "1.0")
    said.clear()
    identity(arrays()).check(path, said.append)
    assert len(said) == 1
    assert "with torch 1.0 and torchvision" in said[0]


def test_digests_of_keys_follow_what_a_stage_reads(tmp_path: Path) -> None:
    root = images(tmp_path)
    before = identity(folder_sets(root))
    was = before.pretext, before.labelled
    replace_bytes(root)
    after = identity(folder_sets(root))
    # Names and sizes of pretext images, contents of labelled ones.
    assert after.pretext == was[0]
    assert after.labelled != was[1]
    with (root / identity(folder_sets(root)).contents("pretext").encoded.file_name(0)).open("ab") as file:  # type: ignore[union-attr]
        file.write(b"0")
    assert identity(folder_sets(root)).pretext != was[0]


def test_a_set_in_memory_has_the_identity_of_its_files(tmp_path: Path) -> None:
    root = images(tmp_path)
    streamed, held = identity(folder_sets(root)), identity(folder_sets(root, "memory"))
    assert (streamed.pretext, streamed.labelled) == (held.pretext, held.labelled)
    sets = folder_sets(root)
    assert read_all(sets["train"].images).subset(torch.tensor([2, 0])).origin.file_name(1) == (  # type: ignore[attr-defined]
        sets["train"].images.file_name(0)  # type: ignore[attr-defined]
    )


def test_a_file_takes_less_than_200_bytes_and_50_on_disk(tmp_path: Path) -> None:
    count = 50_000
    tracemalloc.start()
    try:
        names = "".join(f"n{i // 1000:08d}/{i:012d}.JPEG" for i in range(count)).encode()
        ends = np.arange(0, len(names) + 1, len(names) // count)
        generator = np.random.default_rng(0)
        facts = np.stack([generator.integers(50_000, 200_000, count), generator.integers(2**60, 2**61, count)], axis=1)
        files = FileTable("/images", names, ends[:-1], np.diff(ends).astype(np.int32), facts)
        small = arrays()
        sets = {**small, "pretext": ImageSet(FileImages(files), None, (), "files")}
        one = identity(sets)
        one.check(None, quiet)
        pretext = one.contents("pretext")
        pretext.digests[:] = generator.integers(0, 256, pretext.digests.shape, dtype=np.uint8)
        pretext.known[:] = True
        held, _ = tracemalloc.get_traced_memory()
        assert held / count < 200
        one.keep(tmp_path / "images.npz")
    finally:
        tracemalloc.stop()
    assert (tmp_path / "images.npz").stat().st_size / count < 50
    again = identity(sets)
    again.check(tmp_path / "images.npz", quiet)
    assert again.contents("pretext").known.all()


def test_sets_are_what_a_run_has(tmp_path: Path) -> None:
    sets = arrays()
    made = DownstreamSets(
        sets["train"], sets["val"], sets["test"], {p: list(range(len(sets[p]))) for p in ("train", "val", "test")}
    )
    one = Identity(lambda part: sets["pretext"] if part == "pretext" else getattr(made, part))
    one.check(None, quiet)
    one.keep(tmp_path / "images.npz")
    record = Record.load(tmp_path / "images.npz")
    assert record is not None
    assert [record.listings[part].count for part in ("pretext", "train", "val", "test")] == [14, 10, 4, 6]


def test_a_pretext_file_that_was_never_read_may_be_replaced(tmp_path: Path) -> None:
    root, unlabelled = images(tmp_path), tree(tmp_path / "more", {"all": 6})

    def sets() -> Sets:
        options: dict[str, Any] = {"root": root, "download": False, "evaluated": False, "storage": "stream"}
        return folder_sets(root) | {"pretext": load_pretext(f"folder:{unlabelled}", **options)}

    path, one = tmp_path / "images.npz", identity(sets())
    one.check(None, quiet)
    one.contents("pretext").look([0, 1])
    one.keep(path)
    said: list[str] = []
    picture(70_001, 33, 21).save(unlabelled / "all" / "004.png")
    identity(sets()).check(path, said.append)
    assert said == ["pretext images that had not been read were replaced: stages that read them begin anew"]
    picture(70_002, 34, 22).save(unlabelled / "all" / "000.png")
    assert "pretext: 1 of another size (all/000.png)" in change(sets(), path)
