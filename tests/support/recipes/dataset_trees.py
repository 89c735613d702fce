"""The published data sets in small: trees in their true format on disk, and what a reader must find in them.

Each maker writes below `root` and returns part -> [(image file, class names)] in the order of the set's own lists.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from torchvision.datasets import CIFAR10, CIFAR100, Flowers102

from recipes.vision.sources.published.catalog import DATASETS
from recipes.vision.sources.published.dataset import Dataset
from recipes.vision.sources.published.voc2007 import VOC_CLASSES
from tests.support.recipes.image_trees import picture

Expected = dict[str, list[tuple[Path, tuple[str, ...]]]]


def photograph(file: Path, seed: int) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, 14, 11).save(file, quality=95)
    return file


def write(file: Path, rows: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{row}\n" for row in rows))


def md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()


def flowers(root: Path, monkeypatch: pytest.MonkeyPatch) -> Expected:
    """30 images of 3 classes, ids from 1 in no order; the lists are MATLAB rows, whose MD5 torchvision must know."""
    folder = root / "flowers-102"
    labels = [number % 3 + 1 for number in range(30)]
    files = [photograph(folder / "jpg" / f"image_{number:05d}.jpg", number) for number in range(1, 31)]
    ids = {"trnid": [30, 2, 1, 5, 6, 7], "valid": [3, 8, 10, 12, 14], "tstid": [4, 9, 11, 13, 15, 16, 17]}
    savemat(folder / "imagelabels.mat", {"labels": np.asarray([labels], dtype=np.uint8)})
    savemat(folder / "setid.mat", {key: np.asarray([value], dtype=np.uint16) for key, value in ids.items()})
    sums = {key: (file, md5(folder / file)) for key, file in (("label", "imagelabels.mat"), ("setid", "setid.mat"))}
    monkeypatch.setattr(Flowers102, "_file_dict", {**Flowers102._file_dict, **sums})
    monkeypatch.setattr(Flowers102, "classes", ["pink primrose", "hard-leaved pocket orchid", "canterbury bells"])
    parts = dict(zip(("train", "val", "test"), ids.values(), strict=True))
    return {
        part: [(files[i - 1], (Flowers102.classes[labels[i - 1] - 1],)) for i in chosen]
        for part, chosen in parts.items()
    }


def cars(root: Path, monkeypatch: pytest.MonkeyPatch) -> Expected:
    """MATLAB structs: boxes, class from 1, file name; the test file beside the devkit."""
    folder = root / "stanford_cars"
    names = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Acura TL Sedan 2012"]
    kinds = [(name, "O") for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    (folder / "devkit").mkdir(parents=True)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.asarray([names], dtype=object)})
    expected: Expected = {}
    for part, count, target in (
        ("train", 15, folder / "devkit" / "cars_train_annos.mat"),
        ("test", 8, folder / "cars_test_annos_withlabels.mat"),
    ):
        rows, expected[part] = [], []
        for number in range(1, count + 1):
            label = number * 2 % 3
            file = photograph(folder / f"cars_{part}" / f"{number:05d}.jpg", number + 100 * count)
            rows.append((1, 2, 10, 9, label + 1, file.name))
            expected[part].append((file, (names[label],)))
        annotations = np.empty((1, count), dtype=kinds)
        annotations[0] = rows
        savemat(target, {"annotations": annotations})
    return expected


def aircraft(root: Path, monkeypatch: pytest.MonkeyPatch) -> Expected:
    folder = root / "fgvc-aircraft-2013b" / "data"
    names = ["707-320", "A300B4", "DC-10 30"]
    write(folder / "variants.txt", names)
    expected: Expected = {}
    for start, (part, count) in enumerate((("train", 7), ("val", 6), ("test", 5)), 1):
        chosen = [(1000000 * start + number, names[number % 3]) for number in range(count)]
        write(folder / f"images_variant_{part}.txt", [f"{image} {name}" for image, name in chosen])
        expected[part] = [(photograph(folder / "images" / f"{i}.jpg", i), (name,)) for i, name in chosen]
    return expected


def dtd(root: Path, monkeypatch: pytest.MonkeyPatch) -> Expected:
    folder = root / "dtd" / "dtd"
    expected: Expected = {}
    for start, part in enumerate(("train", "val", "test")):
        chosen = [(name, f"{name}_{start}{i:03d}.jpg") for i in range(2) for name in ("zigzagged", "banded", "dotted")]
        write(folder / "labels" / f"{part}1.txt", [f"{name}/{file}" for name, file in chosen])
        expected[part] = [
            (photograph(folder / "images" / name / file, 10 * start + i), (name,))
            for i, (name, file) in enumerate(chosen)
        ]
    return expected


def pets(root: Path, monkeypatch: pytest.MonkeyPatch) -> Expected:
    """Lists of name, class from 1, species, breed; a class's name is its images' name."""
    folder = root / "oxford-iiit-pet"
    breeds = [("Abyssinian", 1), ("american_bulldog", 2), ("Bengal", 1)]
    expected: Expected = {}
    for part, file, count, first in (("train", "trainval", 15, 1), ("test", "test", 6, 100)):
        rows, expected[part] = [], []
        for number in range(first, first + count):
            label = number % 3
            breed, species = breeds[label]
            rows.append(f"{breed}_{number} {label + 1} {species} 1")
            image = photograph(folder / "images" / f"{breed}_{number}.jpg", number)
            expected[part].append((image, (breed.replace("_", " ").title(),)))
        write(folder / "annotations" / f"{file}.txt", rows)
    return expected


def food101(root: Path, monkeypatch: pytest.MonkeyPatch) -> Expected:
    folder = root / "food-101"
    expected: Expected = {}
    for part, count, first in (("train", 5, 100), ("test", 2, 900)):
        metadata = {name: [f"{name}/{first + i}" for i in range(count)] for name in ("apple_pie", "waffles")}
        write(folder / "meta" / f"{part}.json", [json.dumps(metadata)])
        expected[part] = [
            (photograph(folder / "images" / f"{image}.jpg", 7 * first + i + 50 * (name == "waffles")), (name,))
            for name, images in metadata.items()
            for i, image in enumerate(images)
        ]
    return expected


def caltech101(root: Path, monkeypatch: pytest.MonkeyPatch) -> Expected:
    """Which images train is drawn; "train" and "test" here hold all images of both."""
    folder = root / "caltech101" / "101_ObjectCategories"
    everything = [
        (photograph(folder / name / f"image_{i:04d}.jpg", i + 1000 * count), (name,))
        for name, count in (("Faces", 34), ("BACKGROUND_Google", 3), ("accordion", 31))
        for i in range(1, count + 1)
    ]
    return {"train": [entry for entry in everything if entry[1] != ("BACKGROUND_Google",)], "test": []}


def sun397(root: Path, monkeypatch: pytest.MonkeyPatch) -> Expected:
    folder = root / "SUN397"
    names = ["/a/abbey", "/a/apartment_building/outdoor", "/y/youth_hostel"]
    write(folder / "ClassName.txt", names)
    expected: Expected = {}
    for part, listed in (("train", "Training_01"), ("test", "Testing_01")):
        paths = [f"{name}/sun_{part}{i}.jpg" for name in names for i in range(5)]
        write(folder / f"{listed}.txt", paths)
        expected[part] = [
            (photograph(folder / path[1:], i + 100 * len(part)), (path[3 : path.rindex("/")],))
            for i, path in enumerate(paths)
        ]
    return expected


def cub200(root: Path, monkeypatch: pytest.MonkeyPatch) -> Expected:
    folder = root / "CUB_200_2011"
    names = ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    ids = list(range(1, 21))
    label = {i: (i + 1) // 2 % 2 for i in ids}
    path = {i: f"{names[label[i]]}/{names[label[i]][4:]}_{i:04d}.jpg" for i in ids}
    in_train = {i: int(i % 5 != 0) for i in ids}
    write(folder / "classes.txt", [f"{i} {name}" for i, name in enumerate(names, 1)])
    write(folder / "images.txt", [f"{i} {path[i]}" for i in ids])
    write(folder / "image_class_labels.txt", [f"{i} {label[i] + 1}" for i in ids])
    write(folder / "train_test_split.txt", [f"{i} {in_train[i]}" for i in ids])
    return {
        part: [
            (photograph(folder / "images" / path[i], i), (names[label[i]][4:].replace("_", " "),))
            for i in ids
            if in_train[i] == mark
        ]
        for part, mark in (("train", 1), ("test", 0))
    }


OBJECT = "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>1</xmin></bndbox></object>"


def voc2007(root: Path, monkeypatch: pytest.MonkeyPatch) -> Expected:
    """Each image shows two classes; every fourth has one of them as a difficult object alone."""
    folder = root / "VOCdevkit" / "VOC2007"
    expected: Expected = {}
    for start, part in enumerate(("train", "val", "test")):
        expected[part] = []
        for i in range(20):
            name = f"{1000 * start + i:06d}"
            shown = (VOC_CLASSES[i], VOC_CLASSES[(7 * i + start) % 20])
            objects = OBJECT.format(shown[0], 0) * 2 + OBJECT.format(shown[1], int(i % 4 == 0))
            write(
                folder / "Annotations" / f"{name}.xml", [f"<annotation><folder>VOC2007</folder>{objects}</annotation>"]
            )
            file = photograph(folder / "JPEGImages" / f"{name}.jpg", 1000 * start + i)
            expected[part].append((file, tuple(sorted(set(shown)))))
        write(folder / "ImageSets" / "Main" / f"{part}.txt", [file.stem for file, _ in expected[part]])
    return expected


def idx(file: Path, array: np.ndarray) -> None:
    """An IDX file: magic number, big-endian sizes, bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    file.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes())


def fashion_mnist(root: Path, count: dict[str, int]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Part -> images [n, 1, 28, 28] and labels, as stored."""
    generator = np.random.default_rng(0)
    stored = {}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images = generator.integers(0, 256, (count[part], 1, 28, 28), dtype=np.uint8)
        labels = generator.permutation(np.arange(count[part]) % 10)
        idx(root / "FashionMNIST" / "raw" / f"{prefix}-images-idx3-ubyte", images[:, 0])
        idx(root / "FashionMNIST" / "raw" / f"{prefix}-labels-idx1-ubyte", labels)
        stored[part] = images, labels
    return stored


def python2_string(text: bytes) -> bytes:
    return b"T" + struct.pack("<i", len(text)) + text


def python2_array(array: np.ndarray) -> bytes:
    """The opcodes by which Python 2 pickled an array of bytes (protocol 2), as in the published batches."""
    kind = b"cnumpy\ndtype\n(" + python2_string(b"u1") + b"K\x00K\x01tR(K\x03" + python2_string(b"|")
    kind += b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
    shape = b"J" + struct.pack("<i", array.shape[0]) + b"J" + struct.pack("<i", array.shape[1]) + b"\x86"
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + python2_string(b"b") + b"tR"
    return made + b"(K\x01" + shape + kind + b"\x89" + python2_string(array.tobytes()) + b"tb"


def python2_pickle(entries: dict[str, bytes]) -> bytes:
    """A dictionary of already pickled values."""
    return b"\x80\x02}(" + b"".join(python2_string(key.encode()) + value for key, value in entries.items()) + b"u."


def python2_list(values: list) -> bytes:
    items = [python2_string(v.encode()) if isinstance(v, str) else b"J" + struct.pack("<i", v) for v in values]
    return b"](" + b"".join(items) + b"e"


def cifar(root: Path, published: type[CIFAR10], count: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Part -> images [n, 3, 32, 32] and labels, as stored; `count` images in each batch."""
    generator = np.random.default_rng(1)
    folder = root / published.base_folder
    folder.mkdir(parents=True, exist_ok=True)
    classes = 100 if published is CIFAR100 else 10
    key = "fine_labels" if published is CIFAR100 else "labels"
    stored = {}
    for part, files in (("train", published.train_list), ("test", published.test_list)):
        images, labels = [], []
        for name, _ in files:
            images.append(generator.integers(0, 256, (count, 3 * 32 * 32), dtype=np.uint8))
            labels.append(generator.permutation(np.arange(count) % classes))
            entries = {"data": python2_array(images[-1]), key: python2_list(labels[-1].tolist())}
            (folder / name).write_bytes(python2_pickle(entries))
        stored[part] = np.concatenate(images).reshape(-1, 3, 32, 32), np.concatenate(labels)
    names = python2_list([f"class {i}" for i in range(classes)])
    (folder / published.meta["filename"]).write_bytes(python2_pickle({published.meta["key"]: names}))
    return stored


MAKERS: dict[str, Callable[[Path, pytest.MonkeyPatch], Expected]] = {
    "flowers": flowers,
    "cars": cars,
    "aircraft": aircraft,
    "dtd": dtd,
    "pets": pets,
    "caltech101": caltech101,
    "food101": food101,
    "sun397": sun397,
    "cub200": cub200,
    "voc2007": voc2007,
}


def scaled(name: str, counts: dict[str, int], classes: int) -> Dataset:
    """The table's line with the counts of a small tree."""
    train = counts["train"] + counts.get("val", 0)
    return replace(DATASETS[name], counts=counts, classes=classes, pretext=train)


def small(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Dataset, Expected]:
    """A small tree of the set `name` below `root`; the table is told its counts."""
    expected = MAKERS[name](root, monkeypatch)
    counts = {part: len(entries) for part, entries in expected.items()}
    if name == "caltech101":
        counts = {"train": 60, "test": counts["train"] - 60}
    classes = {label for entries in expected.values() for _, names in entries for label in names}
    dataset = scaled(name, counts, len(classes))
    monkeypatch.setitem(DATASETS, name, dataset)
    return dataset, expected
