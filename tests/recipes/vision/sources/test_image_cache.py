"""The image cache: the same images, no test set, found by what decides them."""

from pathlib import Path

import pytest
import torch

from recipes.vision.errors import DataError
from recipes.vision.imagesets import DownstreamSets
from recipes.vision.sources.image_cache import cache_folder, read_cache, write_cache
from recipes.vision.sources.loading import load_downstream


def digits_sets() -> DownstreamSets:
    return load_downstream("digits", root="data", download=False, labels_per_class=3, val_per_class=2)


def test_the_cache_holds_training_and_validation_images_and_no_test(tmp_path: Path) -> None:
    sets = digits_sets()
    write_cache(tmp_path / "store" / "images", sets)
    found = read_cache(tmp_path / "store" / "images")
    for part in ("train", "val"):
        kept, original = getattr(found, part), getattr(sets, part)
        assert torch.equal(kept.images.stacked(), original.images.stacked())
        assert torch.equal(kept.labels, original.labels)
        assert (kept.classes, kept.name) == (original.classes, original.name)
    assert not hasattr(found, "test")
    stored = sum(path.stat().st_size for path in (tmp_path / "store" / "images").glob("*-pixels.npy"))
    assert stored < sets.train.images.stacked().numel() + sets.val.images.stacked().numel() + 1000
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["images"]


def test_a_damaged_cache_is_refused(tmp_path: Path) -> None:
    write_cache(tmp_path / "images", digits_sets())
    file = tmp_path / "images" / "val-pixels.npy"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"cannot be read.*delete the folder"):
        read_cache(tmp_path / "images")


def test_the_cache_is_found_by_what_decides_the_images(tmp_path: Path) -> None:
    folder = cache_folder(tmp_path, {"source": "digits", "size": 8})
    assert folder.parent == tmp_path
    assert cache_folder(tmp_path, {"size": 8, "source": "digits"}) == folder
    assert cache_folder(tmp_path, {"source": "digits", "size": 9}) != folder
