"""Labels that are planted wrong, and right ones by a table."""

from pathlib import Path

import pytest
import torch

from recipes.vision.errors import DataError
from recipes.vision.imagesets import ImageSet
from recipes.vision.sources.wrong_labels import check_flips, labels_by_table, planted
from tests.support.recipes.image_trees import labelled, tree

LABELS = torch.arange(200) % 4


@pytest.mark.parametrize(
    ("flips", "wrong"), [("uniform:0.2", 40), ("pair:0.4", 80), ("uniform:.011", 2), ("pair:1e-1", 20)]
)
def test_exactly_the_share_is_wrong(flips: str, wrong: int) -> None:
    made = planted(LABELS, 4, flips, 0)
    assert int((made != LABELS).sum()) == wrong
    assert set(made.tolist()) <= {0, 1, 2, 3}
    assert torch.equal(made, planted(LABELS, 4, flips, 0))
    assert not torch.equal(made, planted(LABELS, 4, flips, 1))


def test_pairs_go_to_the_next_class_and_uniform_ones_to_all_others() -> None:
    paired, uniform = planted(LABELS, 4, "pair:0.5", 0), planted(LABELS, 4, "uniform:0.9", 0)
    shift = (paired - LABELS) % 4
    assert set(shift.tolist()) == {0, 1}
    assert set(((uniform - LABELS) % 4).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "flips", ["", "pair", "pair:", "pair:0", "pair:1", "pair:1.0", "pair:-0.1", "swap:0.1", "pair:nan"]
)
def test_flips_that_are_none(flips: str) -> None:
    with pytest.raises(ValueError, match=r"must be uniform:SHARE"):
        check_flips(flips)
    assert check_flips(None) is None


def test_a_table_gives_labels_in_the_order_of_the_pictures(tmp_path: Path) -> None:
    images, table = labelled(f"folder:{tree(tmp_path / 'images', {'a': 2, 'b': 2})}"), tmp_path / "t.csv"
    table.write_text("file,label\nb/001.png,a\nb/000.png,b\na/000.png,b\na/001.png,a\n")
    assert labels_by_table(images, table, "truth").tolist() == [1, 0, 1, 0]
    for content, said in (
        ("file,label\na/000.png,a\n", r"truth: .*t\.csv lacks 3 of the pictures, such as a/001\.png"),
        ("file,label\na/000.png,c\n", "row 2, column 'label': 'c' is no class"),
        ("file,x,y\na/000.png,a,b\n", "has 3 columns; keep two"),
    ):
        table.write_text(content)
        with pytest.raises(DataError, match=said):
            labels_by_table(images, table, "truth")
    with pytest.raises(DataError, match="truth: a table names files"):
        labels_by_table(ImageSet(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), None, ("a", "b"), "x"), table, "truth")
