"""Lists of published sets that are damaged: each refused by one line that names the file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from recipes.vision.errors import DataError
from tests.support.recipes.dataset_trees import small
from tests.support.recipes.image_trees import downstream


def _rewrite(file: Path, change: Callable[[str], str]) -> None:
    file.write_text(change(file.read_text()))


def _cars_label(root: Path) -> None:
    file = root / "stanford_cars/devkit/cars_train_annos.mat"
    annotations = loadmat(file)["annotations"]
    annotations["class"][0, 3] = np.array([[9]], dtype=np.uint8)
    savemat(file, {"annotations": annotations})


DAMAGE: list[tuple[str, str, Callable[[Path], Any], str]] = [
    ("flowers", "list", lambda r: (r / "flowers-102/setid.mat").write_bytes(b"x"), "setid.mat or .*imagelabels.mat"),
    ("flowers", "folder", lambda r: shutil.rmtree(r / "flowers-102/jpg"), "folder .*jpg is missing"),
    ("cars", "label", _cars_label, r"cars_train_annos\.mat gives 00004\.jpg the class 8, .*run from 0 to 2"),
    ("cars", "mat", lambda r: (r / "stanford_cars/devkit/cars_meta.mat").write_bytes(b"not a mat file"), "cars_meta"),
    ("cars", "empty", lambda r: (r / "stanford_cars/devkit/cars_meta.mat").write_bytes(b""), "cars_meta.*damaged"),
    ("cars", "test", lambda r: (r / "stanford_cars/cars_test_annos_withlabels.mat").unlink(), "withlabels.mat is miss"),
    (
        "aircraft",
        "class",
        lambda r: _rewrite(r / "fgvc-aircraft-2013b/data/images_variant_val.txt", lambda s: s.replace("A300B4", "B1")),
        "images_variant_val.txt .*damaged or of another format.*B1",
    ),
    (
        "dtd",
        "line",
        lambda r: _rewrite(r / "dtd/dtd/labels/test1.txt", lambda s: s + "x/y/z\n"),
        "test1.txt is damaged",
    ),
    (
        "dtd",
        "class",
        lambda r: _rewrite(r / "dtd/dtd/labels/test1.txt", lambda s: s.replace("dotted", "woven")),
        "test1.txt has other classes .*dotted, woven",
    ),
    ("food101", "json", lambda r: (r / "food-101/meta/test.json").write_text("{"), "test.json is damaged"),
    ("pets", "line", lambda r: _rewrite(r / "oxford-iiit-pet/annotations/test.txt", lambda s: "#a b\n" + s), "entry 1"),
    (
        "pets",
        "label",
        lambda r: _rewrite(r / "oxford-iiit-pet/annotations/test.txt", lambda s: s.replace("_100 2", "_100 7")),
        r"test\.txt gives .*_100\.jpg the class 6",
    ),
    (
        "sun397",
        "class",
        lambda r: _rewrite(r / "SUN397/ClassName.txt", lambda s: s.replace("abbey", "zoo")),
        "/a/abbey",
    ),
    (
        "cub200",
        "split",
        lambda r: _rewrite(r / "CUB_200_2011/train_test_split.txt", lambda s: s.replace("7 1\n", "7 2\n", 1)),
        "train_test_split.txt gives image 7 the part 2",
    ),
    (
        "cub200",
        "entry",
        lambda r: _rewrite(r / "CUB_200_2011/image_class_labels.txt", lambda s: s.replace("20 1\n", "")),
        "image_class_labels.txt has no entry for image 20",
    ),
    (
        "cub200",
        "number",
        lambda r: _rewrite(r / "CUB_200_2011/image_class_labels.txt", lambda s: s.replace("20 1\n", "20 one\n")),
        "image_class_labels.txt is damaged",
    ),
    (
        "voc2007",
        "xml",
        lambda r: (r / "VOCdevkit/VOC2007/Annotations/001003.xml").write_text("<annotation>"),
        "001003.xml is damaged",
    ),
    (
        "voc2007",
        "class",
        lambda r: _rewrite(r / "VOCdevkit/VOC2007/Annotations/001003.xml", lambda s: s.replace("boat", "unicorn")),
        "001003.xml names an object 'unicorn'",
    ),
    (
        "voc2007",
        "annotation",
        lambda r: (r / "VOCdevkit/VOC2007/Annotations/001003.xml").unlink(),
        "3.xml is miss",
    ),
]


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [(name, damage, said) for name, _, damage, said in DAMAGE],
    ids=[f"{name}-{what}" for name, what, _, _ in DAMAGE],
)
def test_damaged_lists_are_named(
    name: str, damage: Callable[[Path], Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(name, tmp_path, monkeypatch)
    damage(tmp_path)
    with pytest.raises(DataError, match=said) as raised:
        downstream(name, tmp_path)
    assert "\n" not in str(raised.value)
