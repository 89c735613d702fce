"""What sharded parameters would exchange, by hand; what the page says of the kept trials."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.sharding import run as sharding
from benchmarks.sharding.model import Exchange, Size, by_layout, data_parallel, fully_sharded, largest, tensor_parallel
from benchmarks.sharding.tables import rows_of, tables
from tests.support.paths import ROOT

KEPT, PAGE = ROOT / "benchmarks/results/sharding.json", ROOT / "docs/scaling.md"
FIGURES: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8"))
SIZE = Size(100.0, 4, batches=3, pairs=2, activations=10.0, vectors=7.0)


def test_exchanges_by_hand() -> None:
    """Four ranks: three quarters of what is gathered or scattered are sent, six quarters of what is summed."""
    assert data_parallel(SIZE) == Exchange(reduced=100.0)
    assert data_parallel(SIZE).sent(4) == 4 * 150
    # Each of three batches: W in four passes, v, and g and H v.
    assert fully_sharded(SIZE) == Exchange(gathered=3 * 500.0, scattered=3 * 200.0)
    assert fully_sharded(SIZE).sent(4) == 4 * 0.75 * 2100
    assert fully_sharded(SIZE, kept=True).sent(4) == 4 * 0.75 * 1200
    # Two pairs in four passes are eight sums of ten numbers, of which two are not needed.
    assert tensor_parallel(SIZE) == Exchange(reduced=3 * 60.0)
    assert tensor_parallel(SIZE).sent(4) == 4 * 1.5 * 180
    assert data_parallel(Size(100.0, 1)).sent(1) == 0.0


def test_memory_by_hand() -> None:
    held = [numbers for _, numbers in by_layout(SIZE).values()]
    assert held == [700.0, 175.0, 375.0, 175.0]
    assert largest(80.0, 10.0) == 2.0
    assert largest(80.0, 10.0, 8) == 16.0


def test_page_shows_the_kept_figures(tmp_path: Path) -> None:
    arguments = ["--from", str(KEPT), "--docs"]
    assert sharding.main([*arguments, str(PAGE), "--check"]) == 0
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text(encoding="utf-8").replace("| right |", "| wrong |"), encoding="utf-8")
    assert sharding.main([*arguments, str(page), "--check"]) == 1
    assert sharding.main([*arguments, str(page)]) == 0
    assert page.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")
    assert not any(found["quick"] for found in FIGURES.values())
    assert len(FIGURES) == 2


def test_kept_trials_of_bilevel_are_nowhere_wrong() -> None:
    for found in FIGURES.values():
        answers = {trial["answer"] for trial in found["trials"] if trial["part"] == "c"}
        assert answers == {"right", "refused", "error"}


def test_kept_counts_are_those_of_the_model() -> None:
    """For each of four tensors W and v gathered, g and H v scattered; for one pair four sums but two."""
    counts = FIGURES[max(FIGURES, key=lambda version: int(version.split(".")[1]))]["collectives"]
    assert counts["gradient and product, gathered once"] == {
        "all_gather_into_tensor": 4 * 2,
        "reduce_scatter_tensor": 4 * 2,
    }
    one = Size(1.0, 2, batches=1, pairs=1, activations=1.0)
    assert counts["gradient and product, tensor-parallel"] == {"all_reduce": tensor_parallel(one).reduced}


def test_vectors_are_counted() -> None:
    found = sharding.vectors(quick=True)
    assert list(found) == list(sharding.SOLVES)
    # The identity needs a right-hand side, a gradient and the result at the least; CG an iterate and more beside.
    assert 3.0 < found["no product (identity)"]["1"] < found["CG, 5 iterations"]["1"]
    assert found["CG, 5 iterations"]["1"] < found["CG, 5 iterations"]["5"]


def test_neighbours_share_a_row() -> None:
    def trials(*answers: str) -> dict[str, Any]:
        whats = ("f: a", "f: b", "f: c", "d")
        return {"trials": [{"part": "c", "what": w, "answer": a} for w, a in zip(whats, answers, strict=True)]}

    figures = {
        "2.11.0": trials("right", "right", "error", "wrong"),
        "2.14.1": trials("right", "right", "right", "wrong"),
    }
    assert rows_of(figures, ("c",)) == [
        ["f: a; b", "right", "right"],
        ["f: c", "error", "right"],
        ["d", "wrong", "wrong"],
    ]
    assert rows_of(figures, ("a",)) == []
    assert set(tables(FIGURES)) >= {"sharding trials", "sharding layouts", "sharding conditions"}


def test_bad_options() -> None:
    with pytest.raises(SystemExit):
        sharding.main(["--check"])
