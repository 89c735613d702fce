"""Samples, trusted pictures, planted and known labels of a run, and what is refused."""

import shutil
from pathlib import Path

import pytest
import torch

from recipes.cleaning.data import Pictures
from recipes.cleaning.settings import Config, DataConfig
from recipes.vision.errors import DataError
from tests.support.recipes.cleaning_runs import shaded


def pictures(folder: Path, folds: int = 2, **fields: object) -> Pictures:
    return Pictures(Config(folds=folds, data=DataConfig(source=f"folder:{folder}", download=False, **fields)))  # type: ignore[arg-type]


def test_a_fraction_of_each_class_is_trusted(tmp_path: Path) -> None:
    found = pictures(shaded(tmp_path / "data", 10), trusted_fraction=0.3, flips="uniform:0.5")
    sets, other = found.sets(0), found.sets(1)
    assert sets.labels.bincount().tolist() == [3, 3]
    assert sorted([*sets.rows.tolist(), *sets.trusted.tolist()]) == list(range(20))
    assert sets.trusted.tolist() != other.trusted.tolist()
    # Labels of trusted pictures are never flipped.
    assert torch.equal(sets.labels, found.data.labels[sets.trusted])  # type: ignore[index]
    assert sets.right is not None
    assert int((sets.given != sets.right).sum()) == 7


def test_trusted_pictures_of_another_folder_stand_behind_the_data(tmp_path: Path) -> None:
    data = shaded(tmp_path / "data", 6)
    trusted = shaded(tmp_path / "trusted", 3, seed=1)
    sets = pictures(data, trusted=f"folder:{trusted}").sets(0)
    assert sets.rows.tolist() == list(range(12))
    assert sets.trusted.tolist() == list(range(12, 18))
    assert sets.right is None


def test_copies_of_trusted_pictures_are_left_out_and_compared(tmp_path: Path) -> None:
    data = shaded(tmp_path / "data", 6)
    trusted = shaded(tmp_path / "trusted", 3, seed=1)
    shutil.copy(data / "bright" / "002.png", trusted / "bright" / "same.png")
    shutil.copy(data / "dark" / "001.png", trusted / "bright" / "contradicts.png")
    found = pictures(data, trusted=f"folder:{trusted}")
    assert {row: label for row, label in enumerate(found.copies.tolist()) if label >= 0} == {2: 0, 7: 0}
    assert found.sets(0).rows.tolist() == [0, 1, 3, 4, 5, 6, 8, 9, 10, 11]
    assert found.name(7) == "dark/001.png"


def test_copies_of_pictures_held_as_trusted_are_left_out(tmp_path: Path) -> None:
    data = shaded(tmp_path / "data", 8)
    original = data / "bright" / "000.png"
    for i in range(1, 5):
        shutil.copy(original, data / "dark" / f"copy{i}.png")
    found = pictures(data, trusted_fraction=0.4)
    same = [row for row in range(len(found.data)) if found.name(row).startswith("dark/copy")]
    same.append(next(row for row in range(len(found.data)) if found.name(row) == "bright/000.png"))
    for seed in range(5):
        sets = found.sets(seed)
        held = set(same) & set(sets.trusted.tolist())
        left = set(same) & set(sets.rows.tolist())
        assert left == (set() if held else set(same))
        assert set(sets.rows.tolist()) | set(sets.trusted.tolist()) == set(range(20)) - (set(same) - held - left)


def test_labels_known_by_a_table(tmp_path: Path) -> None:
    data, table = shaded(tmp_path / "data", 5), tmp_path / "right.csv"
    rows = [
        f"{name}/{i:03d}.png,{'dark' if (name, i) == ('bright', 3) else name}"
        for name in ("dark", "bright")
        for i in range(5)
    ]
    table.write_text("\n".join(["file,label", *rows]))
    sets = pictures(data, trusted_fraction=0.4, truth=str(table)).sets(0)
    assert sets.right is not None
    both = torch.cat([sets.rows[sets.right != sets.given], sets.trusted[sets.labels != (sets.trusted >= 5).long()]])
    assert both.tolist() == [3]


BAD = {
    "another class": (lambda d, t: (t / "dark").rename(t / "cat"), "must have the same classes.*cat .*dark "),
    "a class less": (lambda d, t: shutil.rmtree(t / "dark"), "single class folder"),
    "one trusted picture": (
        lambda d, t: [(t / "dark" / f"{i:03d}.png").unlink() for i in (0, 1)],
        "'dark' has 1 trusted picture; every",
    ),
    "all are copies": (lambda d, t: (shutil.rmtree(t), shutil.copytree(d, t)), "0 pictures left to look at"),
    "a broken picture": (lambda d, t: (t / "dark" / "000.png").write_bytes(b"no image"), r"000\.png"),
    "no folder": (lambda d, t: shutil.rmtree(t), "there is no folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_trusted_pictures_that_cannot_be_used(name: str, tmp_path: Path) -> None:
    data, trusted = shaded(tmp_path / "data", 6), shaded(tmp_path / "trusted", 3, seed=1)
    change, said = BAD[name]
    change(data, trusted)
    with pytest.raises(DataError, match=said):
        pictures(data, trusted=f"folder:{trusted}").sets(0)


def test_too_few_trusted_pictures_of_a_fraction(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.trusted_fraction: class 'bright' has 1 trusted picture;"):
        pictures(shaded(tmp_path / "data", 10), trusted_fraction=0.1).sets(0)


def test_targets_are_no_classes(tmp_path: Path) -> None:
    data = shaded(tmp_path / "data", 4)
    (data / "labels.csv").write_text("file,height\nbright/000.png,1.5\ndark/000.png,2.5\n")
    with pytest.raises(DataError, match=r"must have one class a picture; it has regression labels"):
        _ = pictures(data).data
