"""Class folders of real image files, and everything that can be wrong with them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.vision.sources import folders
from recipes.vision.sources.loading import DataError, ImageSet
from tests.support.paths import PHOTOGRAPHS
from tests.support.recipes.image_trees import counts, downstream, picture, pretext, rows, tree


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".bmp", ".webp", ".PNG", ".tif", ".TIFF", ".ppm"])
def test_folder_images_are_what_pil_decodes(tmp_path: Path, suffix: str) -> None:
    source = f"folder:{tree(tmp_path, {'cat': 8, 'ant': 8}, suffix)}"
    sets = downstream(source)
    assert sets.train.classes == ("ant", "cat")
    files = sorted((tmp_path / "ant").iterdir()) + sorted((tmp_path / "cat").iterdir())
    for part in ("train", "val", "test"):
        images: ImageSet = getattr(sets, part)
        assert images.labels is not None
        for place, (position, label) in enumerate(zip(sets.indices[part], images.labels, strict=True)):
            expected = np.asarray(Image.open(files[position]).convert("RGB"))
            assert np.array_equal(images.images.at(place).permute(1, 2, 0).numpy(), expected)
            assert files[position].parent.name == sets.train.classes[label]


def test_pictures_keep_their_own_sizes(tmp_path: Path) -> None:
    sizes = [(60, 40), (8, 8), (1, 2000), (31, 17)]
    (tmp_path / "a").mkdir()
    for i, (width, height) in enumerate(sizes):
        picture(i, width, height).save(tmp_path / "a" / f"{i}.png")
    for storage in ("memory", "stream"):
        images = pretext(f"folder:{tmp_path}", evaluated=False, storage=storage).images
        for i, (width, height) in enumerate(sizes):
            expected = torch.from_numpy(np.array(picture(i, width, height))).permute(2, 0, 1)
            assert torch.equal(images.at(i), expected)


def test_hidden_and_other_files_do_not_count_and_nested_ones_do(tmp_path: Path) -> None:
    tree(tmp_path, {"a": 4, "b": 4})
    (tmp_path / ".cache").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("none")
    (tmp_path / "a" / "._000.png").write_bytes(b"none")
    (tmp_path / "a" / "deeper").mkdir()
    picture(77).save(tmp_path / "a" / "deeper" / "x.png")
    listing = folders.list_folder(tmp_path)
    assert listing.classes == ("a", "b")
    assert listing.labels is not None
    assert listing.labels.tolist() == [0] * 5 + [1] * 4
    assert listing.files.relative(4) == "a/deeper/x.png"
    assert listing.passed_over == {".txt": 1, "hidden": 2}


def test_folder_with_its_own_parts(tmp_path: Path) -> None:
    tree(tmp_path / "train", {"a": 10, "b": 10})
    only_train = downstream(f"folder:{tmp_path}")
    assert [len(only_train.train), len(only_train.val), len(only_train.test)] == [12, 3, 5]
    for i, name in enumerate(("a", "b")):
        (tmp_path / "test" / name).mkdir(parents=True)
        picture(5000 + i).save(tmp_path / "test" / name / "t.png")
    with_test = downstream(f"folder:{tmp_path}")
    assert [len(with_test.train), len(with_test.val), len(with_test.test)] == [16, 4, 2]
    assert not rows(pretext(f"folder:{tmp_path}")) & rows(with_test.test)
    assert len(pretext(f"folder:{tmp_path}")) == 20
    (tmp_path / "val" / "b").mkdir(parents=True)
    picture(6000).save(tmp_path / "val" / "b" / "v.png")
    with_both = downstream(f"folder:{tmp_path}")
    assert [len(with_both.train), len(with_both.val), len(with_both.test)] == [20, 1, 2]
    assert counts(with_both.val) == [0, 1]
    assert len(pretext(f"folder:{tmp_path}")) == 21
    positions = [i for part in with_both.indices.values() for i in part]
    assert sorted(positions) == list(range(23))


def test_val_folder_without_test_folder(tmp_path: Path) -> None:
    tree(tmp_path / "train", {"a": 8, "b": 12})
    tree(tmp_path / "val", {"a": 2, "b": 2}, seed=1)
    sets = downstream(f"folder:{tmp_path}")
    assert [len(sets.train), len(sets.val), len(sets.test)] == [15, 4, 5]
    assert rows(pretext(f"folder:{tmp_path}")) == rows(sets.train) | rows(sets.val)


def test_class_may_be_called_train(tmp_path: Path) -> None:
    assert folders.list_folder(tree(tmp_path, {"plane": 3, "train": 3})).classes == ("plane", "train")


def test_rare_classes_are_in_every_part(tmp_path: Path) -> None:
    sets = downstream(f"folder:{tree(tmp_path, {'common': 60, 'rare': 3})}")
    assert [counts(part)[1] for part in (sets.train, sets.val, sets.test)] == [1, 1, 1]


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no folder .*nowhere"):
        downstream(f"folder:{tmp_path / 'nowhere'}")


def test_folder_without_class_folders(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "loose.png")
    with pytest.raises(DataError, match=r"no class folder.*passed over 1 file \(pictures beside class folders 1\)"):
        downstream(f"folder:{tmp_path}")


def test_empty_class_folder(tmp_path: Path) -> None:
    (tree(tmp_path, {"a": 4}) / "b").mkdir()
    (tmp_path / "b" / "readme.txt").write_text("none")
    with pytest.raises(DataError, match=r"b holds no image .*\.webp"):
        downstream(f"folder:{tmp_path}")


def test_parts_without_class_folders_are_not_taken_for_classes(tmp_path: Path) -> None:
    tree(tmp_path, {"train": 5, "test": 5})
    with pytest.raises(DataError, match="train has no class folder"):
        downstream(f"folder:{tmp_path}")


def test_part_of_another_name(tmp_path: Path) -> None:
    tree(tmp_path / "train", {"a": 5, "b": 5})
    tree(tmp_path / "held out", {"a": 5, "b": 5})
    with pytest.raises(DataError, match="held out is neither train, val nor test"):
        downstream(f"folder:{tmp_path}")


def test_test_class_unknown_to_train(tmp_path: Path) -> None:
    tree(tmp_path / "train", {"a": 5, "b": 5})
    tree(tmp_path / "test", {"a": 2, "c": 2})
    with pytest.raises(DataError, match=r"c is a class that .*train does not have"):
        downstream(f"folder:{tmp_path}")


@pytest.mark.skipif(not PHOTOGRAPHS.is_file(), reason="no archive of photographs; name one by BILEVEL_CIFAR_ZIP")
def test_real_photographs(tmp_path: Path) -> None:
    chosen = ("airplane", "frog", "truck")
    with zipfile.ZipFile(PHOTOGRAPHS) as archive:
        for name in chosen:
            for i in range(20):
                archive.extract(f"cifar10/train/{name}/{i:04d}.jpg", tmp_path)
    source = f"folder:{tmp_path / 'cifar10'}"
    sets = downstream(source)
    assert sets.train.classes == chosen
    assert [counts(part) for part in (sets.train, sets.val, sets.test)] == [[12] * 3, [3] * 3, [5] * 3]
    files = sorted((tmp_path / "cifar10").rglob("*.jpg"))
    for position, image in zip(sets.indices["test"], sets.test.images.stacked(), strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(Image.open(files[position])))
    # Photographs, not noise: neighbouring pixels are alike.
    pixels = sets.train.images.stacked().float()
    assert (pixels[..., 1:] - pixels[..., :-1]).abs().mean() < 25
    assert len(pretext(source)) == 45
