"""Multi-label and regression labels: what is refused, how they are split and capped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from recipes.vision.imagesets import LabelKind
from recipes.vision.pictures.memory import ArrayImages
from recipes.vision.sources import loading as data_module
from recipes.vision.sources.loading import DataError, DownstreamSets, ImageSet
from recipes.vision.sources.sources import Source
from recipes.vision.sources.splits import folds, hold_out
from tests.support.recipes.image_trees import downstream, picture, pretext, same_labels

NOISE = np.random.default_rng(0)
# 120 images of three classes: 60 show class 0 (half of them class 2 as well), 40 class 1, 12 class 2 alone, 8 none.
ATTRIBUTES = torch.zeros(120, 3, dtype=torch.bool)
ATTRIBUTES[:60, 0] = True
ATTRIBUTES[:30, 2] = True
ATTRIBUTES[60:100, 1] = True
ATTRIBUTES[100:112, 2] = True
TARGETS = torch.from_numpy(NOISE.normal(size=(120, 2)).astype(np.float32))


def source_of(labels: Tensor, classes: tuple[str, ...]) -> Source:
    pixels = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1)
    return Source("own", classes, labels, {"train": torch.arange(len(labels))}, ArrayImages(pixels))


@pytest.fixture
def attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "_open", lambda *_, **__: source_of(ATTRIBUTES, ("a", "b", "c")))


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "_open", lambda *_, **__: source_of(TARGETS, ("depth", "angle")))


def image_set(labels: Tensor | None, classes: tuple[str, ...] = ("a", "b")) -> ImageSet:
    count = 3 if labels is None else len(labels)
    return ImageSet(torch.zeros(count, 1, 2, 2, dtype=torch.uint8), labels, classes, "set")


def first_classes(labels: Tensor) -> list[int]:
    """By hand: how many images have each class as their first, and how many none."""
    firsts = [next((i for i, there in enumerate(row) if there), 3) for row in labels.tolist()]
    return [firsts.count(i) for i in range(4)]


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (torch.tensor([0, 1, 1]), "single-label"),
        (torch.tensor([[True, False], [False, False], [True, True]]), "multi-label"),
        (torch.tensor([[0.5, -3.0], [1e9, 0.0], [0.0, 0.0]]), "regression"),
        (None, None),
    ],
    ids=["single", "multi", "regression", "none"],
)
def test_kind_is_told_by_the_type(labels: Tensor | None, kind: LabelKind | None) -> None:
    images = image_set(labels)
    assert images.kind == kind
    assert images.subset([2, 0]).kind == kind


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (torch.zeros(3, 3, dtype=torch.bool), r"bool of shape \[N, 2\].*got torch.bool of shape \(3, 3\)"),
        (torch.zeros(3, dtype=torch.bool), "got torch.bool of shape"),
        (torch.zeros(3, 2, dtype=torch.int64), "got torch.int64 of shape"),
        (torch.zeros(3, 2, dtype=torch.float64), "got torch.float64"),
        (torch.tensor([[0.0, 1.0], [0.0, float("nan")]]), "target 1 of image 1 is nan, not finite"),
        (torch.tensor([[float("-inf"), 1.0]]), "target 0 of image 0 is -inf"),
    ],
    ids=["width", "flat", "integers", "double", "nan", "inf"],
)
def test_labels_of_another_shape_or_value_are_refused(labels: Tensor, said: str) -> None:
    with pytest.raises(DataError, match=said):
        image_set(labels)


def test_number_of_rows_is_that_of_the_images() -> None:
    pixels = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    for labels in (torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.bool)):
        with pytest.raises(DataError, match="one row for each of the 4 images, got 3"):
            ImageSet(pixels, labels, ("a", "b"), "set")


def test_downstream_sets_agree_in_kind() -> None:
    single, several = image_set(torch.tensor([0, 1, 1])), image_set(torch.ones(3, 2, dtype=torch.bool))
    indices = {part: [0, 1, 2] for part in ("train", "val", "test")}
    assert DownstreamSets(several, several, several, indices).kind == "multi-label"
    with pytest.raises(DataError, match="test set has multi-label labels, but the train set single-label ones"):
        DownstreamSets(single, single, several, indices)


def test_labels_by_the_classes_of_another_set() -> None:
    pixels, classes = torch.zeros(3, 3, 4, 4, dtype=torch.uint8), ("a", "b", "c")
    one = ImageSet(pixels, torch.tensor([0, 1, 2]), ("c", "a", "b"), "one")
    other = ImageSet(pixels, torch.tensor([0, 1, 2]), classes, "other")
    assert one.by_classes_of(other).classes == classes
    assert same_labels(one.by_classes_of(other), [2, 0, 1])
    few = ImageSet(pixels, torch.tensor([0, 1, 1]), ("a", "d"), "few")
    with pytest.raises(DataError, match=r"few and other must .* alone has b \(other\), c \(other\), d \(few\): rename"):
        few.by_classes_of(other)


def test_folds_spread_each_class_evenly() -> None:
    labels = torch.tensor([0] * 10 + [1] * 7 + [2] * 3)
    made = folds(labels, 3, np.random.default_rng(0))
    assert torch.bincount(made).tolist() == [7, 7, 6]
    for label in range(3):
        counts = torch.bincount(made[labels == label], minlength=3)
        assert int(counts.max() - counts.min()) <= 1
    assert torch.equal(made, folds(labels, 3, np.random.default_rng(0)))
    assert not torch.equal(made, folds(labels, 3, np.random.default_rng(1)))


@pytest.mark.usefixtures("attributes")
def test_multi_label_images_are_stratified_by_their_first_class() -> None:
    sets = downstream("own")
    assert sorted(i for part in sets.indices.values() for i in part) == list(range(120))
    found = {part: first_classes(ATTRIBUTES[sets.indices[part]]) for part in sets.indices}
    assert found == {"test": [15, 10, 3, 2], "val": [9, 6, 2, 1], "train": [36, 24, 7, 5]}
    assert sets.train.labels is not None
    assert torch.equal(sets.train.labels, ATTRIBUTES[sets.indices["train"]])
    assert len(pretext("own")) == 90


@pytest.mark.usefixtures("attributes")
def test_multi_label_caps_count_first_classes_and_keep_all_of_a_rare_one() -> None:
    few, more = downstream("own", labels_per_class=6), downstream("own", labels_per_class=20)
    assert first_classes(ATTRIBUTES[few.indices["train"]]) == [6, 6, 6, 5]
    assert first_classes(ATTRIBUTES[more.indices["train"]]) == [20, 20, 7, 5]
    assert set(few.indices["train"]) < set(more.indices["train"])
    assert few.indices["test"] == downstream("own").indices["test"]


@pytest.mark.usefixtures("targets")
def test_regression_is_split_at_random_and_takes_no_caps() -> None:
    sets = downstream("own")
    assert sets.kind == "regression"
    assert [len(sets.indices[part]) for part in ("train", "val", "test")] == [72, 18, 30]
    assert sorted(i for part in sets.indices.values() for i in part) == list(range(120))
    assert sets.indices["test"] != list(range(30))
    assert downstream("own", split_seed=1).indices != sets.indices
    for part in ("train", "val", "test"):
        labels = getattr(sets, part).labels
        assert torch.equal(labels, TARGETS[sets.indices[part]])
    with pytest.raises(DataError, match=r"labels_per_class = 5 needs classes.* a regression"):
        downstream("own", labels_per_class=5)
    with pytest.raises(DataError, match=r"val_per_class = 5 needs classes.* a regression"):
        downstream("own", val_per_class=5)


def test_sets_too_small_to_be_split() -> None:
    labels = torch.zeros(3, 2)
    generator = np.random.default_rng(0)
    held, rest = hold_out(torch.arange(3), labels, ("x", "y"), name="own", fraction=0.01, keep=2, generator=generator)
    assert (len(held), len(rest)) == (1, 2)
    held, rest = hold_out(torch.arange(3), labels, ("x", "y"), name="own", fraction=0.99, keep=2, generator=generator)
    assert (len(held), len(rest)) == (1, 2)
    with pytest.raises(DataError, match=r"own has too few images .*2 where at least 3 are needed"):
        hold_out(torch.arange(2), labels, ("x", "y"), name="own", fraction=0.5, keep=2, generator=generator)


@pytest.mark.parametrize(
    ("sizes", "val"),
    [
        pytest.param([30] * 194 + [29] * 6, 1194, id="cub200"),
        pytest.param([100] * 32 + [93, 96, 96, 96, 99], 734, id="pets"),
        pytest.param([30] * 101, 606, id="caltech101"),
        pytest.param([50] * 397, 3970, id="sun397"),
        pytest.param([750] * 101, 15150, id="food101"),
        pytest.param([500] * 100, 10000, id="cifar100"),
    ],
)
def test_rounding_down_a_fifth_of_each_class_gives_the_papers_validation_sets(sizes: list[int], val: int) -> None:
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    classes = tuple(str(i) for i in range(len(sizes)))
    held, rest = hold_out(
        torch.arange(len(labels)),
        labels,
        classes,
        name="set",
        fraction=0.2,
        keep=1,
        generator=np.random.default_rng(0),
        rounding="down",
    )
    assert (len(held), len(rest)) == (val, sum(sizes) - val)


PLUGIN = """
import torch
from recipes.vision.imagesets import DownstreamSets, ImageSet

class Angles:
    def pretext(self):
        return ImageSet(torch.zeros(5, 3, 4, 4, dtype=torch.uint8), None, ("angle",), "angles")

    def downstream(self):
        images = ImageSet(torch.zeros(5, 3, 4, 4, dtype=torch.uint8), torch.ones(5, 1), ("angle",), "angles")
        return DownstreamSets(images, images, images, {part: list(range(5)) for part in ("train", "val", "test")})
"""


def test_class_of_ones_own_may_give_any_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_angles_plugin.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    assert downstream("own_angles_plugin:Angles").kind == "regression"
    assert pretext("own_angles_plugin:Angles").kind is None


def labelled_folder(root: Path, rows: list[str]) -> str:
    for i in range(10):
        (root / "deep").mkdir(exist_ok=True)
        picture(i).save(root / ("deep" if i % 2 else ".") / f"{i}.png")
    (root / "labels.csv").write_text("\n".join(rows))
    return f"folder:{root}"


def test_folder_with_a_file_of_labels(tmp_path: Path) -> None:
    names = [f"deep/{i}.png" if i % 2 else f"{i}.png" for i in range(10)]
    source = labelled_folder(tmp_path, ["file,cat,dog", *(f"{name},{i % 2},{i // 5}" for i, name in enumerate(names))])
    sets = downstream(source)
    assert (sets.kind, sets.train.classes) == ("multi-label", ("cat", "dog"))
    assert sets.test.labels is not None
    for position, image, label in zip(sets.indices["test"], sets.test.images.stacked(), sets.test.labels, strict=True):
        assert label.tolist() == [position % 2 == 1, position >= 5]
        expected = np.asarray(Image.open(tmp_path / names[position]))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)
    labelled_folder(tmp_path, ["file,angle", *(f"{name},{i / 4}" for i, name in enumerate(names))])
    angles = downstream(source)
    assert angles.kind == "regression"
    assert angles.train.labels is not None
    assert angles.train.labels[:, 0].tolist() == [i / 4 for i in angles.indices["train"]]
    assert len(pretext(source)) == 10 - len(angles.test)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["file,a"], "needs a header"),
        (["file", "0.png"], "needs a header"),
        ([], "needs a header"),
        (["file,a", "0.png,1,2"], "row 2 has 3 values"),
        (["file,a,b", "0.png,1,0", "2.png,high,1"], "row 3, column 'a': 'high' is no number"),
        (["file,a", "0.png,nan"], "row 2, column 'a': nan stands for a missing value"),
        (["file,a", "0.png,1", "77.png,0"], r"row 3 names .*77\.png, which is missing"),
        (["file,a", "0.png,1", "0.png,0"], r"lists 0\.png twice"),
    ],
    ids=["empty", "no-label", "nothing", "width", "word", "nan", "missing", "twice"],
)
def test_file_of_labels_that_is_wrong(rows: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        downstream(labelled_folder(tmp_path, rows))
