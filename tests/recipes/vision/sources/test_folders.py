"""Class folders of real image files, and everything that can be wrong with them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recipes.vision.sources import folders
from recipes.vision.sources.loading import DataError, ImageSet
from tests.support.paths import PHOTOGRAPHS
from tests.support.recipes.image_trees import counts, downstream, picture, pretext, rows, tree


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".bmp", ".webp", ".PNG", ".tif", ".TIFF", ".ppm"])
def test_folder_images_are_what_pil_decodes(tmp_path: Path, suffix: str) -> None:
    source = f"folder:{tree(tmp_path, {'cat': 8, 'ant': 8}, suffix)}"
    sets = downstream(source, image_size=20)
    assert sets.train.classes == ("ant", "cat")
    files = sorted((tmp_path / "ant").iterdir()) + sorted((tmp_path / "cat").iterdir())
    for part in ("train", "val", "test"):
        images: ImageSet = getattr(sets, part)
        assert images.labels is not None
        for position, image, label in zip(sets.indices[part], images.images, images.labels, strict=True):
            expected = np.asarray(Image.open(files[position]).convert("RGB"))
            assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)
            assert files[position].parent.name == sets.train.classes[label]


def test_folder_images_become_the_central_square_at_the_size_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    wide = picture(1, width=60, height=40)
    for i in range(4):
        wide.save(tmp_path / "a" / f"{i}.png")
    image = pretext(f"folder:{tmp_path}", image_size=10).images[0]
    expected = wide.crop((10, 0, 50, 40)).resize((10, 10), Image.Resampling.BICUBIC)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_narrow_strip_does_not_grow_when_resized(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for i in range(4):
        Image.new("RGB", (1, 200_000), (i, 50, 90)).save(tmp_path / "a" / f"{i}.png")
    images = pretext(f"folder:{tmp_path}", image_size=96)
    assert images.images.shape[1:] == (3, 96, 96)
    assert (images.images[:, 1] == 50).all()


def test_grey_palette_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    base = picture(2)
    for mode in ("L", "P", "RGBA", "1", "CMYK"):
        base.convert(mode).save(tmp_path / "a" / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
    decoded = [folders.decode(file, 20) for file in sorted((tmp_path / "a").iterdir())]
    assert all(image.shape == (20, 20, 3) and image.dtype == np.uint8 for image in decoded)
    grey = folders.decode(tmp_path / "a" / "L.png", 20)
    assert (grey[..., 0] == grey[..., 1]).all()


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


def test_decoding_in_chunks_by_one_or_more_threads_keeps_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted((tree(tmp_path, {"a": 11}) / "a").iterdir())
    monkeypatch.setattr(folders, "CHUNK", 3)
    for threshold in (0, 10**9):
        monkeypatch.setattr(folders, "SMALL_FILE", threshold)
        images = folders.decode_all(files, 20)
        for file, image in zip(files, images, strict=True):
            assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(Image.open(file)))
    assert folders.decode_all([], 20).shape == (0, 3, 20, 20)


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


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_truncated_image_is_named(tmp_path: Path, suffix: str) -> None:
    file = tree(tmp_path, {"a": 5}, suffix) / "a" / f"002{suffix}"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=rf"002\{suffix} cannot be decoded"):
        folders.decode_all(sorted((tmp_path / "a").iterdir()), 8)


@pytest.mark.parametrize("content", [b"", b"this is text", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_file_that_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    (tree(tmp_path, {"a": 8}) / "a" / "000.png").write_bytes(content)
    with pytest.raises(DataError, match=r"000\.png cannot be decoded"):
        folders.decode_all(sorted((tmp_path / "a").iterdir()), 8)


def test_image_of_too_many_pixels_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "MAX_PIXELS", 1000)
    picture(0, 40, 25).save(tmp_path / "fits.png")
    picture(0, 41, 25).save(tmp_path / "bomb.png")
    assert folders.decode(tmp_path / "fits.png", 8).shape == (8, 8, 3)
    with pytest.raises(DataError, match=r"bomb\.png has 41 x 25 px"):
        folders.decode(tmp_path / "bomb.png", 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"fits\.png is too large"):
        folders.decode(tmp_path / "fits.png", 8)


def test_sixteen_bit_image_is_named(tmp_path: Path) -> None:
    Image.fromarray(np.full((9, 9), 40000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png has more than 8 bits"):
        folders.decode(tmp_path / "deep.png", 8)


@pytest.mark.skipif(not PHOTOGRAPHS.is_file(), reason="no archive of photographs; name one by BILEVEL_CIFAR_ZIP")
def test_real_photographs(tmp_path: Path) -> None:
    chosen = ("airplane", "frog", "truck")
    with zipfile.ZipFile(PHOTOGRAPHS) as archive:
        for name in chosen:
            for i in range(20):
                archive.extract(f"cifar10/train/{name}/{i:04d}.jpg", tmp_path)
    source = f"folder:{tmp_path / 'cifar10'}"
    sets = downstream(source, image_size=32)
    assert sets.train.classes == chosen
    assert [counts(part) for part in (sets.train, sets.val, sets.test)] == [[12] * 3, [3] * 3, [5] * 3]
    files = sorted((tmp_path / "cifar10").rglob("*.jpg"))
    for position, image in zip(sets.indices["test"], sets.test.images, strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(Image.open(files[position])))
    # Photographs, not noise: neighbouring pixels are alike.
    pixels = sets.train.images.float()
    assert (pixels[..., 1:] - pixels[..., :-1]).abs().mean() < 25
    assert len(pretext(source, image_size=32)) == 45
