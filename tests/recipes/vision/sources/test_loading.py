"""Splits, caps and the sources by name, on the bundled digits and small trees of image files."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import datasets

from recipes.vision.sources import sources
from recipes.vision.sources.loading import DataError, DownstreamSets, ImageSet
from tests.support.recipes.image_trees import counts, downstream, labelled, pretext, rows, same_labels, tree

DIGITS: Any = datasets.load_digits()


def test_digits_are_scikit_learns_scaled_to_bytes() -> None:
    sets = downstream("digits")
    for part in ("train", "val", "test"):
        images: ImageSet = getattr(sets, part)
        chosen = sets.indices[part]
        pixels = images.images.stacked()
        assert pixels.shape[1:] == (1, 8, 8)
        assert np.array_equal(pixels[:, 0].numpy(), np.rint(DIGITS.images[chosen] / 16 * 255))
        assert same_labels(images, DIGITS.target[chosen])
        assert images.classes == tuple("0123456789")
    assert int(sets.train.images.stacked().max()) == 255


def test_digits_that_scikit_learn_keeps_elsewhere_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from_the_file = pretext("digits")
    monkeypatch.setattr(sources, "DIGITS", "datasets/elsewhere.csv.gz")
    assert torch.equal(pretext("digits").images.stacked(), from_the_file.images.stacked())


def test_without_scikit_learn_the_digits_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "find_spec", lambda _: None)
    with pytest.raises(DataError, match=r"come with scikit-learn: install it by pip install 'bilevel\[demo\]'"):
        downstream("digits")


def test_splits_are_disjoint_complete_stratified_and_seeded() -> None:
    target = DIGITS.target
    sets = downstream("digits")
    together = [i for part in ("train", "val", "test") for i in sets.indices[part]]
    assert sorted(together) == list(range(1797))
    assert len(sets.test) == round(1797 * 0.25)
    assert len(sets.val) == round((1797 - len(sets.test)) * 0.2)
    everything = np.bincount(target)
    for label, (in_test, in_val) in enumerate(zip(counts(sets.test), counts(sets.val), strict=True)):
        assert abs(in_test - 0.25 * everything[label]) < 1
        assert abs(in_val - 0.2 * (everything[label] - in_test)) < 1
    assert downstream("digits").indices == sets.indices
    other = downstream("digits", split_seed=1).indices
    assert all(other[part] != sets.indices[part] for part in other)


def test_pretext_holds_everything_but_the_test_images() -> None:
    for seed, fraction in ((0, 0.25), (3, 0.5)):
        options: dict[str, Any] = dict(split_seed=seed, test_fraction=fraction)
        images = pretext("digits", **options)
        sets = downstream("digits", labels_per_class=5, **options)
        assert images.labels is None
        assert len(images) == 1797 - len(sets.test)
        used = sorted(set(range(1797)) - set(sets.indices["test"]))
        reference = np.rint(DIGITS.images[used] / 16 * 255)
        assert np.array_equal(images.images.stacked()[:, 0].numpy(), reference)


def test_limit_keeps_a_random_nested_choice(tmp_path: Path) -> None:
    source = f"folder:{tree(tmp_path, {'a': 20, 'b': 20})}"
    full = rows(pretext(source))
    few, more = pretext(source, limit=6), pretext(source, limit=15)
    assert (len(few), len(more), len(pretext(source, limit=999))) == (6, 15, len(full))
    assert rows(few) < rows(more) < full
    assert rows(pretext(source, limit=6, split_seed=0)) == rows(few)
    firsts = rows(pretext(source).subset(range(6)))
    assert rows(few) != firsts


def test_caps_keep_that_many_a_class_nested_and_leave_the_test_set_whole() -> None:
    full = downstream("digits")
    small = downstream("digits", labels_per_class=5, val_per_class=3)
    larger = downstream("digits", labels_per_class=20)
    assert counts(small.train) == [5] * 10
    assert counts(small.val) == [3] * 10
    assert counts(larger.train) == [20] * 10
    assert set(small.indices["train"]) < set(larger.indices["train"]) < set(full.indices["train"])
    assert set(small.indices["val"]) < set(full.indices["val"])
    assert larger.indices["val"] == full.indices["val"]
    assert small.indices["test"] == full.indices["test"]
    assert same_labels(small.train, DIGITS.target[small.indices["train"]])
    first = [[i for i in full.indices["train"] if DIGITS.target[i] == label][:5] for label in range(10)]
    assert small.indices["train"] != sorted(i for chosen in first for i in chosen)


def test_class_with_too_few_images(tmp_path: Path) -> None:
    tree(tmp_path, {"many": 12, "few": 2})
    for load in (downstream, pretext):
        with pytest.raises(DataError, match=r"'few' has too few images .*: 2 where at least 3"):
            load(f"folder:{tmp_path}")
    with pytest.raises(DataError, match=r"'0' has too few images for labels_per_class = 5: \d+ are left"):
        downstream("digits", labels_per_class=5, test_fraction=0.99)
    with pytest.raises(DataError, match=r"too few images for val_per_class = 400: \d+ are left"):
        downstream("digits", val_per_class=400)


@pytest.mark.parametrize(
    "options",
    [
        dict(labels_per_class=0),
        dict(val_per_class=-1),
        dict(val_fraction=0.0),
        dict(test_fraction=1.0),
        dict(test_fraction=float("nan")),
        dict(split_seed=-1),
    ],
)
def test_numbers_out_of_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=next(iter(options))):
        downstream("digits", **options)
    with pytest.raises(DataError, match="limit"):
        pretext("digits", limit=0)


def test_unknown_source_lists_what_there_is() -> None:
    for name in ("stl11", "", "folder:", "folder"):
        with pytest.raises(DataError, match=r"digits, stl10, flowers, .*voc2007, folder:PATH"):
            downstream(name)


PLUGIN = """
import torch
from recipes.vision.imagesets import DownstreamSets, ImageSet

def images(count):
    labels = torch.arange(count) % 3
    pixels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1)
    return ImageSet(pixels.expand(-1, 3, 4, 4), labels, tuple("xyz"), "own")

class Own:
    def pretext(self):
        return images(30)

    def downstream(self):
        order = {"train": list(range(100, 112)), "val": list(range(6)), "test": list(range(3))}
        return DownstreamSets(images(12), images(6), images(3), order)

class Half:
    def pretext(self):
        return images(3)

class Wrong(Own):
    def pretext(self):
        return torch.zeros(3)

    def downstream(self):
        return None

instance = Own()
"""


def test_class_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_images_plugin.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path not in ("", os.getcwd())])
    sets = downstream("own_images_plugin:Own", labels_per_class=2)
    assert counts(sets.train) == [2, 2, 2]
    assert [100 + int(image[0, 0, 0]) for image in sets.train.images.stacked()] == sets.indices["train"]
    assert len(sets.val) == 6
    images = pretext("own_images_plugin:Own", limit=7)
    assert len(images) == 7
    assert images.labels is None
    with pytest.raises(DataError, match=r"methods pretext\(\) and downstream\(\)"):
        pretext("own_images_plugin:Half")
    with pytest.raises(DataError, match="must return an ImageSet"):
        pretext("own_images_plugin:Wrong")
    with pytest.raises(DataError, match="must return DownstreamSets"):
        downstream("own_images_plugin:Wrong")
    with pytest.raises(DataError, match="must name a class"):
        downstream("own_images_plugin:instance")
    with pytest.raises(DataError, match=r"no 'Missing'; its classes: .*Half.*Own"):
        downstream("own_images_plugin:Missing")


def test_image_set_checks_its_parts() -> None:
    images = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    for wrong in (images.float(), images[0], images.expand(3, 2, 4, 4)):
        with pytest.raises(DataError, match="images must be uint8"):
            ImageSet(wrong, None, (), "set")
    for labels in (torch.zeros(2, dtype=torch.int64), torch.zeros(3)):
        with pytest.raises(DataError, match="labels must be int64"):
            ImageSet(images, labels, ("a",), "set")
    for labels in (torch.tensor([0, 2, 0]), torch.tensor([0, -1, 0])):
        with pytest.raises(DataError, match=r"set: image 1 has label (2|-1)"):
            ImageSet(images, labels, ("a", "b"), "set")


def test_subset_takes_images_and_labels_together() -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1)
    whole = ImageSet(images, torch.tensor([0, 1, 2, 1, 0]), ("a", "b", "c"), "set")
    part = whole.subset([3, 0])
    assert len(part) == 2
    assert part.images.stacked().flatten().tolist() == [3, 0]
    assert part.labels is not None
    assert part.labels.tolist() == [1, 0]
    assert (part.classes, part.name) == (whole.classes, whole.name)


def test_downstream_sets_check_their_parts() -> None:
    def labelled(classes: tuple[str, ...] = ("a", "b")) -> ImageSet:
        return ImageSet(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1]), classes, "set")

    indices = {"train": [0, 1], "val": [2, 3], "test": [4, 5]}
    bare = ImageSet(labelled().images, None, ("a", "b"), "set")
    with pytest.raises(DataError, match="val set needs images and labels"):
        DownstreamSets(labelled(), bare, labelled(), indices)
    with pytest.raises(DataError, match="test set needs images and labels"):
        DownstreamSets(labelled(), labelled(), labelled().subset([]), indices)
    with pytest.raises(DataError, match="classes of the test set differ"):
        DownstreamSets(labelled(), labelled(), labelled(("b", "a")), indices)
    with pytest.raises(DataError, match=r"indices\['val'\]"):
        DownstreamSets(labelled(), labelled(), labelled(), {"train": [0, 1], "test": [4, 5]})


@pytest.mark.parametrize(
    ("labels", "classes", "said"),
    [
        ([0, 0, 0], ("cat",), "set has a single class, 'cat', .* add another one"),
        ([1, 1, 1], ("cat", "dog"), "all 3 training images are of class 'dog', one of 2, .* training part"),
    ],
    ids=["one class", "one in train"],
)
def test_one_class_is_nothing_to_tell_apart(labels: list[int], classes: tuple[str, ...], said: str) -> None:
    images = ImageSet(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor(labels), classes, "set")
    indices = {part: [0, 1, 2] for part in ("train", "val", "test")}
    with pytest.raises(DataError, match=said):
        DownstreamSets(images, images, images, indices)
    # Of other kinds of labels one column is enough.
    for other in (torch.ones(3, 1), torch.ones(3, 1, dtype=torch.bool), torch.zeros(3, 2, 2, dtype=torch.uint8)):
        single = ImageSet(images.images, other, ("red",), "set")
        assert DownstreamSets(single, single, single, indices).train is single


def test_a_list_keeps_the_training_images_that_it_names(tmp_path: Path) -> None:
    folder = tree(tmp_path / "images", {"train/a": 6, "train/b": 6, "val/a": 2, "val/b": 2, "test/a": 2, "test/b": 2})
    names = sorted(path.relative_to(folder).as_posix() for path in (folder / "train").rglob("*.png"))
    chosen = [names[0], names[3], names[7]]
    listed = tmp_path / "percent.txt"
    listed.write_text("\n".join(chosen) + "\n")
    whole, some = (downstream(f"folder:{folder}", train_list=given) for given in (None, listed))
    positions = [names.index(name) for name in chosen]
    assert rows(some.train) == rows(whole.train.subset(positions))
    assert counts(some.train) == [2, 1]
    assert rows(some.val) == rows(whole.val)
    assert rows(some.test) == rows(whole.test)


def test_a_list_that_fits_nothing_is_refused(tmp_path: Path) -> None:
    folder = tree(tmp_path / "images", {"train/a": 6, "train/b": 6, "test/a": 2, "test/b": 2})
    listed = tmp_path / "percent.txt"
    held_out = next(path.relative_to(folder).as_posix() for path in (folder / "test").rglob("*.png"))
    listed.write_text(held_out)
    with pytest.raises(DataError, match="only held-out ones"):
        downstream(f"folder:{folder}", train_list=listed)
    with pytest.raises(DataError, match="digits are none; use labels_per_class"):
        downstream("digits", train_list=listed)


def test_all_labelled_images_of_any_part_are_one_set(tmp_path: Path) -> None:
    for seed, part in enumerate(("train", "val", "test")):
        tree(tmp_path / "images" / part, {"a": 2, "b": 1}, seed=seed)
    images = labelled(f"folder:{tmp_path / 'images'}")
    assert (len(images), images.classes, counts(images)) == (9, ("a", "b"), [6, 3])
    assert images.images.origin.file_name(3) == "val/a/000.png"  # type: ignore[attr-defined]
    assert len(labelled("digits")) == 1797


def test_a_labelled_set_of_one_class_is_refused(tmp_path: Path) -> None:
    tree(tmp_path / "images", {"a": 2})
    (tmp_path / "images" / "labels.csv").write_text("file,label\na/000.png,a\na/001.png,a\n")
    with pytest.raises(DataError, match="has a single class, 'a', which leaves nothing to tell apart"):
        labelled(f"folder:{tmp_path / 'images'}")


def test_images_without_labels_are_no_labelled_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no class folder"):
        labelled(f"folder:{tmp_path}")
