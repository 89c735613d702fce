"""How well planted wrong labels of digits are found, beside out-of-fold losses."""

import json
from pathlib import Path
from typing import Any

import pytest

from recipes.cleaning.command import main


def areas(folder: Path, flips: str, seeds: int, *options: str) -> dict[str, list[float]]:
    """Areas under the curve of each ranking, one a seed."""
    given = ["--data=digits", f"--flips={flips}", f"--seeds={seeds}", "--threads=1", "--shown=0", "--device=cpu"]
    assert main([*given, *options, "--output-dir", str(folder)]) == 0
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return {name: one["area_under_curve"]["per_seed"] for name, one in results["rankings"].items()}


def check_pairs(found: dict[str, list[float]]) -> None:
    for method, loss in zip(found["weighted fit"], found["out-of-fold loss"], strict=True):
        assert method >= 0.95
        assert method >= loss + 0.1


def test_structured_flips_are_found_where_out_of_fold_losses_miss_them(tmp_path: Path) -> None:
    check_pairs(areas(tmp_path / "run", "pair:0.4", 1))


@pytest.mark.parametrize("method", ["implicit", "soba"])
def test_a_network_finds_them_too(method: str, tmp_path: Path) -> None:
    options = ("--learning.hidden=16", f"--learning.method={method}", "--learning.epochs=5", "--folds=2")
    found = areas(tmp_path / "run", "pair:0.4", 1, *options)
    assert found["weighted fit"][0] >= 0.93
    assert found["weighted fit"][0] >= found["out-of-fold loss"][0] + 0.07


@pytest.mark.slow
def test_structured_flips_in_five_seeds(tmp_path: Path) -> None:
    check_pairs(areas(tmp_path / "run", "pair:0.4", 5))


@pytest.mark.slow
def test_uniform_flips_are_found_as_well_as_by_out_of_fold_losses(tmp_path: Path) -> None:
    found = areas(tmp_path / "run", "uniform:0.2", 5)
    for method, loss in zip(found["weighted fit"], found["out-of-fold loss"], strict=True):
        assert method >= 0.98
        assert method >= loss - 0.005
