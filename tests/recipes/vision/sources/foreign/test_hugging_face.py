"""Hugging Face datasets on a disk: pictures, labels of every kind of column, parts, parquet, and what is refused."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recipes.vision.errors import DataError
from recipes.vision.pictures.arrow import ArrowImages, ArrowItem
from recipes.vision.sources.foreign.hugging_face import open_hugging_face
from recipes.vision.sources.loading import load_downstream
from recipes.vision.sources.sources import Source
from tests.support.recipes.encoded_pictures import ON_ITS_SIDE, by_pillow, cache, encoded, picture_and_packages, request

datasets: Any = pytest.importorskip("datasets")
pyarrow: Any = pytest.importorskip("pyarrow")

__all__ = ["cache"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for a network fails."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a network was asked for")

    for call in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, call, never)
    monkeypatch.setattr(socket.socket, "connect", never)


def rows(count: int, first: int = 0, kind: str = "PNG") -> list[dict[str, Any]]:
    return [{"bytes": encoded(number, kind), "path": f"{number}.x"} for number in range(first, first + count)]


def dataset(images: list[Any], column: str = "image", **others: tuple[Any, list[Any]]) -> Any:
    """A Dataset of pictures and other columns, each with its feature and its values."""
    features = {column: datasets.Image()} | {name: feature for name, (feature, _) in others.items()}
    values = {column: images} | {name: held for name, (_, held) in others.items()}
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def classes(*names: str) -> Any:
    return datasets.ClassLabel(names=list(names))


def value(kind: str) -> Any:
    return datasets.Value(kind)


def saved(path: Path, held: Any, **options: Any) -> Path:
    held.save_to_disk(str(path), **options)
    return path


def pictures(source: Source) -> ArrowImages:
    assert isinstance(source.images, ArrowImages)
    return source.images


def labels(source: Source) -> list[Any]:
    assert source.labels is not None
    return source.labels.tolist()


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pictures_come_at_their_own_size_as_pillow_decodes_them(tmp_path: Path, kind: str, shards: int) -> None:
    contents = [encoded(n, kind, ON_ITS_SIDE if kind == "JPEG" and n % 2 else None) for n in range(7)]
    held = dataset([{"bytes": content, "path": None} for content in contents])
    path = saved(tmp_path / "set", held, num_shards=shards)
    source = open_hugging_face(str(path), request("pretext"))
    assert source.parts["unlabelled"].tolist() == list(range(7))
    images = pictures(source)
    assert len(images.paths) == shards
    assert images.nbytes == sum(map(len, contents))
    chosen = images.subset(torch.tensor([6, 0, 3, 3]))
    for position, number in enumerate((6, 0, 3, 3)):
        item = pickle.loads(pickle.dumps(chosen.items([position])[0]))
        assert item.content() == contents[number]
        assert torch.equal(item.picture(), by_pillow(contents[number]))
    assert len({tuple(images.at(at).shape) for at in range(5)}) == 5


def test_a_choice_made_before_saving_holds(tmp_path: Path) -> None:
    held = dataset(rows(8), label=(classes("a", "b"), [0, 1] * 4))
    path = saved(tmp_path / "set", held.select([5, 2, 2, 7]).shuffle(seed=0))
    source = open_hugging_face(str(path), request())
    stored = datasets.load_from_disk(str(path)).cast_column("image", datasets.Image(decode=False))
    assert [item.content() for item in pictures(source).items(range(4))] == [row["image"]["bytes"] for row in stored]
    assert labels(source) == stored["label"][:]


def test_labels_are_read_without_a_look_at_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [{"bytes": b"no picture at all", "path": None}] * 3
    path = saved(tmp_path / "set", dataset(broken, label=(classes("a", "b"), [1, 0, 1])))
    monkeypatch.setattr(ArrowItem, "content", None)
    assert labels(open_hugging_face(str(path), request())) == [1, 0, 1]
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"\.arrow: row 1 cannot be decoded"):
        pictures(open_hugging_face(str(path), request())).at(1)


@pytest.mark.parametrize(
    ("column", "feature", "values", "names", "expected"),
    [
        ("label", classes("dog", "cat"), [1, 0, 1, 1], ("dog", "cat"), torch.tensor([1, 0, 1, 1])),
        ("breed", classes("a", "b", "c"), [1, 0, 1, 0], ("a", "b", "c"), torch.tensor([1, 0, 1, 0])),
        ("label", value("string"), ["x", "ä", "x", "b"], ("b", "x", "ä"), torch.tensor([1, 2, 1, 0])),
        ("label", value("large_string"), ["x", "y", "x", "x"], ("x", "y"), torch.tensor([0, 1, 0, 0])),
        ("labels", value("int64"), [7, 10, 9, 7], ("7", "9", "10"), torch.tensor([0, 2, 1, 0])),
        ("label", value("uint8"), [1, 0, 1, 0], ("0", "1"), torch.tensor([1, 0, 1, 0])),
        ("label", value("bool"), [True, False, True, True], ("False", "True"), torch.tensor([1, 0, 1, 1])),
        (
            "tags",
            "list of classes",
            [[0, 2], [], [1], [2, 2]],
            ("p", "q", "r"),
            torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 1]]).bool(),
        ),
        ("label", value("float32"), [0.5, -1, 2, 3], ("label",), torch.tensor([[0.5], [-1], [2], [3]])),
        ("label", value("float64"), [0.5, -1, 2, 3], ("label",), torch.tensor([[0.5], [-1], [2], [3]])),
        (
            "label",
            "list of floats",
            [[0.5, 1], [2, 3], [4, 5], [6, 7]],
            ("0", "1"),
            torch.tensor([[0.5, 1], [2, 3], [4, 5], [6, 7]]),
        ),
    ],
)
def test_every_kind_of_label_column(
    tmp_path: Path, column: str, feature: Any, values: list[Any], names: tuple[str, ...], expected: torch.Tensor
) -> None:
    if feature == "list of classes":
        feature = datasets.Sequence(classes(*names))
    elif feature == "list of floats":
        feature = datasets.Sequence(value("float32"))
    held = dataset(rows(4), **{column: (feature, values), "id": (value("int64"), [1, 2, 3, 4])})
    source = open_hugging_face(str(saved(tmp_path / "set", held, num_shards=2)), request())
    assert source.classes == names
    assert source.labels is not None
    assert source.labels.dtype == expected.dtype
    assert torch.equal(source.labels, expected)


def test_columns_are_chosen_by_options(tmp_path: Path) -> None:
    held = dataset(
        rows(3),
        depth=(datasets.Image(), rows(3, 10)),
        fine=(classes("a", "b", "c"), [0, 1, 2]),
        coarse=(classes("u", "v"), [0, 1, 1]),
        x=(value("float32"), [0.5, 1.5, 2.5]),
        y=(value("int32"), [1, 2, 3]),
        red=(value("bool"), [True, False, True]),
        round=(value("bool"), [False, False, True]),
        words=(value("string"), ["m", "n", "m"]),
    )
    path = saved(tmp_path / "set", held)
    with pytest.raises(DataError, match=r"several columns are images \(image, depth\): choose one by \?image=image"):
        open_hugging_face(str(path), request())
    with pytest.raises(DataError, match=r"several columns are labels \(fine, coarse\): choose one by \?label=fine"):
        open_hugging_face(f"{path}?image=depth", request())
    source = open_hugging_face(f"{path}?image=depth&label=coarse", request())
    assert (source.classes, labels(source)) == (("u", "v"), [0, 1, 1])
    assert torch.equal(pictures(source).at(1), by_pillow(encoded(11)))
    chosen: dict[str, tuple[tuple[str, ...], list[Any]]] = {
        "words": (("m", "n"), [0, 1, 0]),
        "x,y": (("x", "y"), [[0.5, 1], [1.5, 2], [2.5, 3]]),
        "red,round": (("red", "round"), [[True, False], [False, False], [True, True]]),
    }
    for option, (names, expected) in chosen.items():
        source = open_hugging_face(f"{path}?image=image&label={option}", request())
        assert (source.classes, labels(source)) == (names, expected)
    assert open_hugging_face(f"{path}?image=image&label=", request()).labels is None
    for option, message in (
        ("label=colour", r"no column 'colour' for label; there are: image, depth"),
        ("label=depth", r"the column 'depth' holds Image.* which is no label"),
        ("label=x,words", r"the column 'words' holds .*must be booleans"),
        ("image=words", r"the column 'words' holds .*, no images: cast it by cast_column"),
        ("image=photo", r"no column 'photo' for image"),
        ("picture=image", r"no option 'picture'; there are: image, label, train, val, test, unlabelled"),
        ("image=image&image=depth", r"the option image is given twice"),
    ):
        with pytest.raises(DataError, match=message):
            open_hugging_face(f"{path}?{option}" + ("" if option[0] in "ip" else "&image=image"), request())


@pytest.mark.parametrize(
    ("splits", "options", "parts"),
    [
        ({"train": 4, "validation": 3, "test": 2}, "", {"train": 4, "val": 3, "test": 2}),
        ({"test": 2, "train": 4}, "", {"train": 4, "test": 2}),
        ({"train": 4, "valid": 3}, "", {"train": 4, "val": 3}),
        ({"Train": 4, "dev": 3}, "", {"train": 4, "val": 3}),
        ({"test": 4}, "", {"train": 4}),
        ({"train": 4, "test": 2, "unsupervised": 5}, "", {"train": 4, "test": 2}),
        ({"extra": 4, "train": 3, "val": 2}, "?train=extra&test=val", {"train": 4, "test": 2}),
        ({"a": 4, "b": 3, "c": 2}, "?test=a&val=b&train=c", {"train": 2, "val": 3, "test": 4}),
    ],
)
def test_splits_are_parts(tmp_path: Path, splits: dict[str, int], options: str, parts: dict[str, int]) -> None:
    held = {
        split: dataset(rows(count, 10 * number), label=(classes("a", "b"), [count % 2] * count))
        for number, (split, count) in enumerate(splits.items())
    }
    path = saved(tmp_path / "set", datasets.DatasetDict(held))
    source = open_hugging_face(f"{path}{options}", request())
    assert {part: len(positions) for part, positions in source.parts.items()} == parts
    assert torch.cat(list(source.parts.values())).tolist() == list(range(sum(parts.values())))
    for positions in source.parts.values():
        assert source.labels is not None
        assert source.labels[positions].tolist() == [len(positions) % 2] * len(positions)


def test_unlabelled_splits_are_for_the_pretext_task_alone(tmp_path: Path) -> None:
    held = {
        "train": dataset(rows(3), label=(classes("a", "b"), [0, 1, 1])),
        "test": dataset(rows(2, 10), label=(classes("a", "b"), [0, 1])),
        "unlabeled": dataset(rows(4, 20)),
    }
    path = saved(tmp_path / "set", datasets.DatasetDict(held))
    source = open_hugging_face(str(path), request("pretext"))
    assert source.labels is None
    assert [pictures(source).items([at])[0].content() for at in source.parts["unlabelled"].tolist()] == [
        encoded(number) for number in range(20, 24)
    ]
    del held["unlabeled"]
    path = saved(tmp_path / "other", datasets.DatasetDict({k: v.remove_columns("label") for k, v in held.items()}))
    assert open_hugging_face(str(path), request("pretext")).parts["unlabelled"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([0, 1, 1], [-1, -1], r"image 0 of its test part has no label, but others do: name the parts"),
        ([0, None, 1], [0, 1], r"image 1 of its train part has no label"),
        ([0, 1, -1], [0, 1], r"image 2 of its train part has no label"),
        ([0, 5, 1], [0, 1], r"(image 1 has label 5|5 out of range)"),
    ],
)
def test_labels_that_are_missing_or_no_class_are_named(
    tmp_path: Path, train: list[Any], test: list[Any], message: str
) -> None:
    held = {
        part: dataset(rows(len(values)), label=(value("int64"), values))
        for part, values in (("train", train), ("test", test))
    }
    kind = classes("a", "b")
    path = saved(tmp_path / "set", datasets.DatasetDict(held))
    for part in held:
        info = path / part / "dataset_info.json"
        content = json.loads(info.read_text())
        content["features"]["label"] = {"names": kind.names, "_type": "ClassLabel"}
        info.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        open_hugging_face(str(path), request())
    if test == [-1, -1]:
        assert labels(open_hugging_face(f"{path}?train=train", request())) == train


def test_a_column_in_which_no_row_has_a_label_is_none(tmp_path: Path) -> None:
    path = saved(tmp_path / "set", dataset(rows(3), label=(classes("a", "b"), [-1, -1, None])))
    source = open_hugging_face(str(path), request("pretext"))
    assert source.labels is None
    assert source.parts["unlabelled"].tolist() == [0, 1, 2]


def test_lists_of_labels_that_do_not_fit_are_named(tmp_path: Path) -> None:
    floats = dataset(rows(3), label=(datasets.Sequence(value("float32")), [[1, 2], [3, 4], [5]]))
    with pytest.raises(DataError, match=r"label: row 2 has 1 targets, but row 0 has 2"):
        open_hugging_face(str(saved(tmp_path / "floats", floats)), request())
    tags = dataset(rows(3), label=(datasets.Sequence(classes("a", "b")), [[1], None, [0]]))
    with pytest.raises(DataError, match=r"label: row 1 has no labels: write an empty list for no class"):
        open_hugging_face(str(saved(tmp_path / "tags", tags)), request())
    gap = dataset(rows(2), label=(value("float32"), [1.0, None]))
    with pytest.raises(DataError, match=r"target 0 of image 1 is nan, not finite"):
        open_hugging_face(str(saved(tmp_path / "gap", gap)), request())
    texts = dataset(rows(2), label=(datasets.Sequence(value("string")), [["a"], ["b"]]))
    with pytest.raises(DataError, match=r"the column 'label' holds .*, which is no label"):
        open_hugging_face(str(saved(tmp_path / "texts", texts)), request())


def stored_by_path(path: Path, entries: list[dict[str, Any]]) -> Path:
    """A saved set whose Arrow file holds these entries as they are."""
    saved(path, dataset(rows(len(entries))))
    (arrow,) = path.glob("*.arrow")
    with pyarrow.ipc.open_stream(arrow.read_bytes()) as reader:
        schema = reader.schema
    table = pyarrow.Table.from_arrays([pyarrow.array(entries, schema.field("image").type)], schema=schema)
    with pyarrow.OSFile(str(arrow), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        writer.write_table(table)
    return path


def test_pictures_of_which_only_the_path_is_kept_are_read_from_it(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(encoded(3))
    gone = str(tmp_path / "gone.png")
    entries = [
        {"bytes": None, "path": str(tmp_path / "p.png")},
        {"bytes": encoded(4), "path": gone},
        {"bytes": None, "path": gone},
    ]
    images = pictures(open_hugging_face(str(stored_by_path(tmp_path / "set", entries)), request("pretext")))
    assert torch.equal(images.at(0), by_pillow(encoded(3)))
    assert torch.equal(images.at(1), by_pillow(encoded(4)))
    with pytest.raises(DataError, match=r"\.arrow: row 2 names the file .*gone.png, which cannot be read \(No such"):
        images.at(2)
    assert images.nbytes is None
    assert images.subset(torch.tensor([1])).nbytes == len(encoded(4))


def test_rows_without_a_picture_are_named(tmp_path: Path) -> None:
    for number, missing in enumerate((None, {"bytes": None, "path": None})):
        entries = [{"bytes": encoded(0), "path": None}, missing]
        path = stored_by_path(tmp_path / str(number), entries)  # type: ignore[arg-type]
        with pytest.raises(DataError, match=r"row 1 has no picture in 'image'"):
            open_hugging_face(str(path), request("pretext"))


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], {"train": 6}),
        (
            ["data/train-0.parquet", "data/validation-0.parquet", "data/test-0.parquet"],
            {"train": 3, "val": 3, "test": 3},
        ),
        (["train/0000.parquet", "train/0001.parquet", "test/0000.parquet"], {"train": 6, "test": 3}),
        (["one.parquet"], {"train": 3}),
    ],
)
def test_parquet_is_copied_once_outside_the_data_and_said(
    tmp_path: Path, cache: Path, names: list[str], parts: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "hub"
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        held = dataset(rows(3, 10 * number), label=(classes("a", "b"), [0, 1, number % 2]))
        held.to_parquet(str(folder / name))
    source = open_hugging_face(str(folder), request())
    said = capsys.readouterr().err
    assert f"Arrow files in {cache}" in said
    assert " MB" in said
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*.*")) == sorted(names)
    assert {part: len(positions) for part, positions in source.parts.items()} == parts
    assert source.classes == ("a", "b")
    for position, number in enumerate(number for part in parts for number, name in enumerate(names) if part in name):
        assert torch.equal(pictures(source).at(3 * position), by_pillow(encoded(10 * number)))
        assert labels(source)[3 * position : 3 * position + 3] == [0, 1, number % 2]
    before = {file: file.stat().st_mtime_ns for file in cache.rglob("*.arrow")}
    again = open_hugging_face(str(folder), request())
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*.arrow")} == before
    assert "copying" not in capsys.readouterr().err
    assert pictures(again).paths == pictures(source).paths
    dataset(rows(2, 50), label=(classes("a", "b"), [1, 0])).to_parquet(str(folder / names[0]))
    changed = open_hugging_face(str(folder), request())
    assert torch.equal(pictures(changed).at(0), by_pillow(encoded(50)))


def test_parquet_that_others_wrote_and_a_file_alone(tmp_path: Path) -> None:
    table = pyarrow.table({"photo": [encoded(0), encoded(1)], "kind": ["x", "y"], "n": [1, 2]})
    structs = pyarrow.table({"photo": rows(2), "kind": ["x", "y"]})
    for number, held in enumerate((table, structs)):
        file = tmp_path / f"{number}.parquet"
        pyarrow.parquet.write_table(held, file)
        with pytest.raises(
            DataError, match=r"none of the columns \(photo, kind.*\) is of type Image: .*\?image=COLUMN"
        ):
            open_hugging_face(str(file), request())
        source = open_hugging_face(f"{file}?image=photo&label=kind", request())
        assert (source.classes, labels(source)) == (("x", "y"), [0, 1])
        assert torch.equal(pictures(source).at(1), by_pillow(encoded(1)))


def test_what_is_no_data_set_is_refused_by_name(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"there is no folder .*nowhere; .*save_to_disk"):
        open_hugging_face(str(tmp_path / "nowhere"), request())
    with pytest.raises(DataError, match=r"there is no folder user/flowers; .*save_to_disk"):
        open_hugging_face("user/flowers", request())
    with pytest.raises(DataError, match=r"holds neither what datasets' save_to_disk writes nor parquet files"):
        open_hugging_face(str(tmp_path / "empty"), request())
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    with pytest.raises(DataError, match=r"bad.parquet and its like cannot be copied"):
        open_hugging_face(str(tmp_path / "bad.parquet"), request())
    no_image = datasets.Dataset.from_dict({"text": ["a"], "label": [1]})
    with pytest.raises(DataError, match=r"none of the columns \(text, label\) is of type Image"):
        open_hugging_face(str(saved(tmp_path / "text", no_image)), request())
    strange = datasets.DatasetDict({"train": dataset(rows(1)), "bonus": dataset(rows(1))})
    path = saved(tmp_path / "strange", strange)
    with pytest.raises(DataError, match=r"the split 'bonus' is none that is known .*\?train=bonus"):
        open_hugging_face(str(path), request("pretext"))
    with pytest.raises(DataError, match=r"test=more, but its splits are train, bonus"):
        open_hugging_face(f"{path}?test=more", request("pretext"))
    other = datasets.DatasetDict(
        {
            "train": dataset(rows(2), label=(classes("a", "b"), [0, 1])),
            "test": dataset(rows(2), label=(classes("b", "a"), [0, 1])),
        }
    )
    with pytest.raises(DataError, match=r"the column 'label' is ClassLabel.* in test, but ClassLabel.* in train"):
        open_hugging_face(str(saved(tmp_path / "other", other)), request())


@pytest.mark.parametrize("file", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "other"])
def test_damage_is_a_sentence(tmp_path: Path, file: str, damage: str) -> None:
    path = saved(tmp_path / "set", dataset(rows(5), label=(classes("a", "b"), [0, 1, 0, 1, 0])))
    whole = (path / file).read_bytes()
    if damage == "gone":
        (path / file).unlink()
    else:
        (path / file).write_bytes({"empty": b"", "cut": whole[: len(whole) // 3], "other": b"[1]"}[damage])
    with pytest.raises(DataError, match=r"(damaged|neither what datasets)"):
        open_hugging_face(str(path), request())


def test_items_name_what_they_need_alone(tmp_path: Path) -> None:
    path = saved(tmp_path / "set", dataset(rows(5) * 200))
    images = pictures(open_hugging_face(str(path), request("pretext")))
    assert len(pickle.dumps(images.items([999])[0])) < 300 + len(str(tmp_path))
    arrays = (images.file, images.rows, images.sizes)
    assert sum(array.nbytes for array in arrays) / 1000 + 8 < 200
    assert all(isinstance(array, np.ndarray) for array in arrays)
    item = images.items([3])[0]
    moved = ArrowItem(str(tmp_path / "moved.arrow"), item.column, item.row)
    shutil.move(item.path, moved.path)
    assert moved.content() == encoded(3)
    with pytest.raises(DataError, match=r"elsewhere.arrow cannot be read .*missing or damaged"):
        ArrowItem(str(tmp_path / "elsewhere.arrow"), item.column, 0).content()


def test_another_process_reads_the_same_and_needs_pyarrow_alone(tmp_path: Path) -> None:
    images = pictures(open_hugging_face(str(saved(tmp_path / "set", dataset(rows(4)))), request("pretext")))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.map(picture_and_packages, images.items([2, 0]))
    assert all(
        np.array_equal(pixels, by_pillow(encoded(number))) for (pixels, _), number in zip(there, (2, 0), strict=True)
    )
    assert there[0][1] == {"pyarrow"}


def test_a_run_takes_a_saved_set_by_its_name(tmp_path: Path) -> None:
    values = [number % 3 for number in range(30)]
    path = saved(tmp_path / "set", dataset(rows(30), label=(classes("a", "b", "c"), values)))
    sets = load_downstream(f"hf:{path}", root=tmp_path, download=False)
    assert (len(sets.train), len(sets.val), len(sets.test)) == (18, 4, 8)
    assert sets.train.classes == ("a", "b", "c")


def test_minus_one_in_a_plain_column_is_no_label(tmp_path: Path) -> None:
    path = saved(tmp_path / "set", dataset(rows(3), label=(value("int64"), [4, -1, 2])))
    with pytest.raises(DataError, match=r"image 1 of its train part has no label"):
        open_hugging_face(str(path), request())


def test_labels_that_nobody_wants_are_left_alone(tmp_path: Path) -> None:
    two = dataset(rows(3), a=(classes("x", "y"), [0, 1, 0]), b=(classes("x", "y"), [0, 1, 0]))
    path = saved(tmp_path / "set", datasets.DatasetDict({"train": two, "test": two}))
    source = open_hugging_face(str(path), request("pretext"), labelled=False)
    assert (source.labels, source.parts["unlabelled"].tolist()) == (None, [0, 1, 2])
