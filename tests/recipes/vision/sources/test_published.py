"""Every published set from a small tree in its true format, and everything that can be wrong with one."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, STL10, FashionMNIST, OxfordIIITPet

from recipes.vision.errors import DataError
from recipes.vision.pictures import base
from recipes.vision.sources.published.catalog import DATASETS
from recipes.vision.sources.published.dataset import open_dataset
from recipes.vision.sources.sources import Request, Source
from tests.support.recipes.dataset_trees import MAKERS, cifar, fashion_mnist, md5, scaled, small
from tests.support.recipes.image_trees import downstream, pretext, rows


def opened(name: str, root: Path, *, split_seed: int = 0) -> Source:
    return open_dataset(DATASETS[name], Request(root, False, "downstream", split_seed))


def names_of(source: Source, position: int) -> tuple[str, ...]:
    assert source.labels is not None
    label = source.labels[position]
    if label.ndim == 0:
        return (source.classes[int(label)],)
    return tuple(sorted(source.classes[i] for i in label.nonzero().flatten().tolist()))


def decoded(file: Path) -> np.ndarray:
    """The picture by PIL, as uint8 [3, H, W]."""
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def read(source: Source, positions: Tensor) -> Tensor:
    return source.images.subset(positions).stacked()


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "caltech101"])
def test_files_labels_and_parts_are_those_of_the_tree(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected = small(name, tmp_path, monkeypatch)
    source = opened(name, tmp_path)
    assert list(source.parts) == list(expected)
    for part, entries in expected.items():
        positions = source.parts[part]
        images = read(source, positions)
        assert len(positions) == len(entries)
        for position, image, (file, classes) in zip(positions.tolist(), images, entries, strict=True):
            assert names_of(source, position) == classes
            assert np.array_equal(image.numpy(), decoded(file)), file


@pytest.mark.parametrize("name", MAKERS)
def test_downstream_parts_are_disjoint_and_the_pretext_images_are_all_but_the_test_ones(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, expected = small(name, tmp_path, monkeypatch)
    sets = downstream(name, tmp_path)
    everything = sorted(position for part in sets.indices.values() for position in part)
    assert everything == list(range(sum(len(entries) for entries in expected.values())))
    assert len(sets.test) == dataset.counts["test"]
    if "val" in dataset.counts:
        assert len(sets.val) == dataset.counts["val"]
    else:
        train, val = sets.train.labels, sets.val.labels
        assert train is not None
        assert val is not None
        together = torch.bincount(torch.cat((train, val))).tolist()
        # The rule that gives the paper's numbers: a fifth of each class, rounded down, and at least one.
        assert torch.bincount(val).tolist() == [max(1, count // 5) for count in together]
    images = pretext(name, tmp_path)
    assert images.labels is None
    assert len(images) == dataset.pretext
    assert rows(images) == rows(sets.train) | rows(sets.val)


def test_caltech101_draws_thirty_of_each_class_by_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected = small("caltech101", tmp_path, monkeypatch)
    source = opened("caltech101", tmp_path)
    assert source.classes == ("Faces", "accordion")
    assert source.labels is not None
    assert torch.bincount(source.labels[source.parts["train"]]).tolist() == [30, 30]
    assert torch.bincount(source.labels[source.parts["test"]]).tolist() == [4, 1]
    truth = {decoded(file).tobytes(): classes for file, classes in expected["train"]}
    images = read(source, torch.arange(65))
    assert [truth.pop(image.numpy().tobytes()) for image in images] == [names_of(source, i) for i in range(65)]
    assert truth == {}
    train = read(source, source.parts["train"])
    again, other = opened("caltech101", tmp_path), opened("caltech101", tmp_path, split_seed=1)
    assert torch.equal(read(again, again.parts["train"]), train)
    assert not torch.equal(read(other, other.parts["train"]), train)
    # The test images stay out of the pretext set for every seed.
    for seed in (0, 1):
        kept = rows(pretext("caltech101", tmp_path, split_seed=seed))
        assert not kept & rows(downstream("caltech101", tmp_path, split_seed=seed).test)


def test_pets_are_labelled_as_torchvision_labels_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small("pets", tmp_path, monkeypatch)
    source = opened("pets", tmp_path)
    assert source.labels is not None
    for part, split in (("train", "trainval"), ("test", "test")):
        reference = OxfordIIITPet(tmp_path, split)
        assert list(source.classes) == reference.classes
        assert source.labels[source.parts[part]].tolist() == [label for _, label in reference]


def test_voc_counts_difficult_objects_and_is_multi_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected = small("voc2007", tmp_path, monkeypatch)
    sets = downstream("voc2007", tmp_path)
    assert sets.kind == "multi-label"
    labels = sets.test.labels
    assert labels is not None
    assert labels.dtype == torch.bool
    assert labels.sum(1).tolist() == [len(classes) for _, classes in expected["test"]]
    annotation = (tmp_path / "VOCdevkit/VOC2007/Annotations/000004.xml").read_text()
    assert "<difficult>1</difficult>" in annotation
    assert len(expected["train"][4][1]) == 2


def test_only_what_a_cap_leaves_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small("cars", tmp_path, monkeypatch)
    seen: list[str] = []

    def noted(content: bytes, name: str) -> Tensor:
        seen.append(name)
        return torch.zeros(3, 2, 2, dtype=torch.uint8)

    monkeypatch.setattr(base, "decode", noted)
    downstream("cars", tmp_path, labels_per_class=1, val_per_class=1)
    assert len(seen) == len(set(seen)) == 3 + 3 + 8


@pytest.mark.parametrize(("name", "published"), [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_cifar_is_read_as_torchvision_reads_it(
    name: str, published: type[CIFAR10], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, classes = (20, 10) if name == "cifar10" else (200, 100)
    stored = cifar(tmp_path, published, count)
    sizes = {part: len(labels) for part, (_, labels) in stored.items()}
    monkeypatch.setitem(DATASETS, name, scaled(name, sizes, classes))
    folder = tmp_path / published.base_folder
    for files in ("train_list", "test_list"):
        listed = [[file, md5(folder / file)] for file, _ in getattr(published, files)]
        monkeypatch.setattr(published, files, listed)
    meta = published.meta
    monkeypatch.setattr(published, "meta", {**meta, "md5": md5(folder / meta["filename"])})
    source = opened(name, tmp_path)
    assert source.labels is not None
    for part, (images, labels) in stored.items():
        positions = source.parts[part]
        reference = published(tmp_path, train=part == "train")
        assert list(source.classes) == reference.classes
        assert np.array_equal(read(source, positions).permute(0, 2, 3, 1).numpy(), reference.data)
        assert np.array_equal(read(source, positions).numpy(), images)
        assert source.labels[positions].tolist() == reference.targets == labels.tolist()
    assert read(source, torch.tensor([3, 1])).shape == (2, 3, 32, 32)


def test_addresses_sums_and_files_are_torchvisions() -> None:
    for name, published in {"cifar10": CIFAR10, "cifar100": CIFAR100, "stl10": STL10}.items():
        assert [(a.url, a.md5, a.into) for a in DATASETS[name].archives] == [(published.url, published.tgz_md5, ".")]
        files = [file for file, _ in published.train_list + published.test_list]
        if name != "stl10":
            files.append(published.meta["filename"])
        assert set(DATASETS[name].needs) == {f"{published.base_folder}/{file}" for file in files}
    fashion = [(archive.url, archive.md5, archive.into) for archive in DATASETS["fashion-mnist"].archives]
    expected = [(FashionMNIST.mirrors[0] + file, md5, "FashionMNIST/raw") for file, md5 in FashionMNIST.resources]
    assert fashion == expected


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (pickle.dumps({"data": print}), "refers to builtins.print"),
        (pickle.dumps({"data": Path("x")}), "refers to pathlib"),
        (pickle.dumps([1, 2]), "holds a list"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 2, 3]}), "for 3 labels"),
        (pickle.dumps({"data": np.zeros((2, 3072)), "labels": [1, 2]}), "data is float64"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8)}), "damaged or of another format"),
        (b"", "damaged or of another format|no batch"),
        (b"\x80\x04garbage", "damaged or of another format|no batch"),
    ],
    ids=["function", "object", "list", "count", "dtype", "key", "empty", "garbage"],
)
def test_cifar_batches_that_are_something_else(content: bytes, said: str, tmp_path: Path) -> None:
    cifar(tmp_path, CIFAR10, 20)
    (tmp_path / CIFAR10.base_folder / "data_batch_2").write_bytes(content)
    with pytest.raises(DataError, match=f"data_batch_2.*({said})"):
        opened("cifar10", tmp_path)


def test_fashion_mnist_is_read_as_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = fashion_mnist(tmp_path, {"train": 50, "test": 20})
    monkeypatch.setitem(DATASETS, "fashion-mnist", scaled("fashion-mnist", {"train": 50, "test": 20}, 10))
    source = opened("fashion-mnist", tmp_path)
    assert list(source.classes) == FashionMNIST.classes
    assert source.labels is not None
    for part, (images, labels) in stored.items():
        assert np.array_equal(read(source, source.parts[part]).numpy(), images)
        assert source.labels[source.parts[part]].tolist() == labels.tolist()
    assert [len(part) for part in downstream("fashion-mnist", tmp_path).indices.values()] == [40, 10, 20]
    file = tmp_path / "FashionMNIST" / "raw" / "train-labels-idx1-ubyte"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match="train-labels-idx1-ubyte is damaged or of another format"):
        opened("fashion-mnist", tmp_path)


@pytest.mark.parametrize("name", MAKERS)
def test_missing_image_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected = small(name, tmp_path, monkeypatch)
    file = expected["train"][2][0]
    file.unlink()
    with pytest.raises(DataError, match=rf"missing, the first is .*{file.name}|has 64 images|at least 31") as raised:
        opened(name, tmp_path)
    assert DATASETS[name].title in str(raised.value)


@pytest.mark.parametrize("name", MAKERS)
def test_truncated_image_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected = small(name, tmp_path, monkeypatch)
    file = expected["train"][1][0]
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(DataError, match=rf"{file.name} cannot be decoded"):
        pretext(name, tmp_path)


@pytest.mark.parametrize("name", DATASETS)
def test_set_that_is_not_there_says_where_to_put_it(name: str, tmp_path: Path) -> None:
    dataset = DATASETS[name]
    with pytest.raises(DataError) as raised:
        downstream(name, tmp_path)
    message = str(raised.value)
    assert f"{dataset.title} cannot be read: the " in message
    assert "is missing" in message
    assert f"so that {tmp_path} holds {dataset.needs[0]}" in message
    assert "\n" not in message
    if name in ("cars", "sun397"):
        assert "official download is gone" in message
    else:
        assert dataset.archives[0].url in message
    with pytest.raises(DataError):
        pretext(name, tmp_path)
    assert list(tmp_path.rglob("*.jpg")) == []


@pytest.mark.parametrize("name", MAKERS)
def test_another_count_or_class_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, _ = small(name, tmp_path, monkeypatch)
    fewer = {**dataset.counts, "test": dataset.counts["test"] + 1}
    monkeypatch.setitem(DATASETS, name, replace(dataset, counts=fewer))
    with pytest.raises(DataError, match=rf"{name} has {dataset.counts['test']} images in its test part here, but"):
        opened(name, tmp_path)
    monkeypatch.setitem(DATASETS, name, replace(dataset, classes=dataset.classes + 1))
    with pytest.raises(DataError, match=rf"{name} has {dataset.classes} classes here, but {dataset.classes + 1}"):
        opened(name, tmp_path)


def test_empty_class_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small("cub200", tmp_path, monkeypatch)
    file = tmp_path / "CUB_200_2011" / "image_class_labels.txt"
    file.write_text("".join(f"{i} 1\n" for i in range(1, 21)))
    with pytest.raises(DataError, match="no image of class 'Laysan Albatross' in its train part"):
        opened("cub200", tmp_path)


def test_table_agrees_with_the_specification() -> None:
    splits = {
        "stl10": (4000, 1000, 8000, 10),
        "flowers": (1020, 1020, 6149, 102),
        "cars": (6598, 1546, 8041, 196),
        "aircraft": (3334, 3333, 3333, 100),
        "dtd": (1880, 1880, 1880, 47),
        "pets": (2946, 734, 3669, 37),
        "fashion-mnist": (48000, 12000, 10000, 10),
        "cifar10": (40000, 10000, 10000, 10),
        "cifar100": (40000, 10000, 10000, 100),
        "caltech101": (2424, 606, 5647, 101),
        "food101": (60600, 15150, 25250, 101),
        "sun397": (15880, 3970, 19850, 397),
        "cub200": (4800, 1194, 5794, 200),
        "voc2007": (2501, 2510, 4952, 20),
    }
    assert {name: (*dataset.split, dataset.classes) for name, dataset in DATASETS.items()} == splits
    for name, dataset in DATASETS.items():
        assert sum(dataset.counts.values()) == sum(dataset.split)
        assert dataset.counts["test"] == dataset.split[2]
        if name != "stl10":
            assert dataset.pretext == dataset.split[0] + dataset.split[1]
