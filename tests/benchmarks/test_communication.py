"""What is exchanged: hand-counted messages, the calls of two and four processes, the kept figures."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from benchmarks.communication import run as communication
from benchmarks.communication.case import sizes_of
from benchmarks.communication.model import Schedule, Sizes, alternation, by_step, channels, pretext_step, product, sent
from benchmarks.communication.tables import tables
from benchmarks.pages import insert
from tests.support.paths import ROOT
from tests.support.rank_processes import on_ranks

KEPT, PAGE = ROOT / "benchmarks" / "results" / "communication.json", ROOT / "docs" / "distributed.md"

TINY = Sizes(
    ranks=2,
    batch=6,
    labelled=4,
    embedding=10,
    classes=3,
    backbone=100,
    heads=20,
    head=7,
    backbone_norms=(4,),
    head_norms=(),
)


def test_a_pretext_step_by_hand() -> None:
    """60 numbers of embeddings, and, for each of two views, from each rank the count, 4 means and 4 sums of squares."""
    expected = {
        ("all-gather", 240): 1,
        ("all-gather", 72): 2,
        ("all-gather", 16): 1,
        ("all-reduce", 240): 1,
        ("all-reduce", 72): 2,
        ("all-reduce", 484): 1,
        ("all-reduce", 8): 1,
    }
    assert pretext_step(TINY) == expected
    # Of two, a rank sends half of what is gathered, and all of what is summed.
    assert sent(pretext_step(TINY), 2) == (240 + 2 * 72 + 16) / 2 + (240 + 2 * 72 + 484 + 8)
    assert sent(Counter({("all-reduce", 100): 3}), 4) == 3 * 150


def test_a_product_by_hand() -> None:
    """Three batches, each gathered twice and summed twice, and one mean of 100 numbers for all of them."""
    expected = {
        ("all-gather", 240): 6,
        ("all-gather", 72): 12,
        ("all-gather", 16): 3,
        ("all-reduce", 240): 6,
        ("all-reduce", 72): 12,
        ("all-reduce", 400): 1,
    }
    assert product(TINY, Schedule(hessian_batches=3)) == expected
    assert Schedule(iterations=5, layerwise=True).products == 6
    assert Schedule(iterations=5, layerwise=False).products == 5


def test_sizes_of_a_network() -> None:
    sizes = sizes_of("resnet18", 8, 1024, 256, "synchronised")
    # ResNet-18 without its classifier, and three layers of 256 with two norms (the paper's section 4.2.1).
    assert (sizes.backbone, len(sizes.backbone_norms), sum(sizes.backbone_norms)) == (11_176_512, 20, 4800)
    assert (sizes.heads, sizes.head_norms) == (512 * 256 + 2 * 256**2 + 3 * 256 + 4 * 256, (256, 256))
    assert (sizes.embedding, sizes.head) == (512, 5130)
    assert channels(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm2d(5))) == (3, 5)
    # Without synchronised norms an alternation has fewer messages, and the running statistics instead.
    local = sizes_of("resnet18", 8, 1024, 256, "local")
    assert local.joined == 2 * (4800 + 512)
    assert alternation(local, Schedule()).total() < 0.1 * alternation(sizes, Schedule()).total()


def counts_here() -> dict[str, Any]:
    # Raises where they are not the model's. Synchronised norms take many calls, slow between processes on one core.
    return {"local": communication.counts("local"), "synchronised": communication.counts("synchronised", whole=False)}


def test_the_calls_of_several_processes_are_the_predicted_ones(tmp_path: Path) -> None:
    for world, ranks in on_ranks(counts_here, tmp_path, seconds=240.0).items():
        for rank in ranks:
            for batch_norm, steps in rank.items():
                check_counts(steps, batch_norm, world)
            assert len(rank["local"]) == 5


def check_counts(steps: dict[str, list[list[Any]]], batch_norm: str, world: int) -> None:
    sizes = sizes_of("resnet-tiny", world, communication.BATCH, communication.LABELLED, batch_norm)
    predicted = by_step(sizes, communication.SHORT)
    for name, entries in steps.items():
        assert {(kind, size): count for kind, size, count in entries} == predicted[name]


def test_other_calls_than_the_predicted_ones_are_told() -> None:
    # One process calls nothing.
    message = r"pretext step, BatchNorm local: \{\} beyond what the model says, \{.*\} missing"
    with pytest.raises(RuntimeError, match=message):
        communication.counts("local", whole=False)


@pytest.mark.skipif(not KEPT.exists(), reason="not measured yet")
def test_the_kept_figures() -> None:
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    assert not kept["quick"]
    for batch_norm, steps in kept["counts"].items():
        check_counts(steps, batch_norm, communication.RANKS)
    for entry in kept["steps"]:
        assert 0.0 < entry["exchange"]["median"] < entry["step"]["median"]


@pytest.mark.skipif(not (KEPT.exists() and PAGE.exists()), reason="not measured, or not written yet")
def test_the_page_shows_the_kept_figures() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert insert(page, tables(json.loads(KEPT.read_text(encoding="utf-8")))) == page
