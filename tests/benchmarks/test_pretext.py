"""The benchmark of the pretext stage: it runs, keeps consistent figures, and does without lightly."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import measuring, pretext
from recipes.vision.losses import nt_xent

ARGUMENTS = ["--quick", "--batch", "4", "--pipeline-batch", "6", "--images", "8", "--size", "16"]


def test_quick_run_without_lightly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "lightly", None)
    monkeypatch.setitem(sys.modules, "lightly.loss", None)
    path = tmp_path / "figures.json"
    assert pretext.main([*ARGUMENTS, "--json", str(path)]) == 0
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert set(figures["pipeline"]) == {"uint8 crops", "float crops"}
    assert set(figures["step"]) == set(figures["whole"]) == set(figures["peak_memory_mib"]) == {"bilevel"}
    assert "lightly" in figures["missing"]
    assert figures["setting"]["batch"] == 4
    assert figures["environment"]["torch"] == str(torch.__version__)
    speed = figures["step"]["bilevel"]["images_per_second"]
    assert 0 < speed["q1"] <= speed["median"] <= speed["q3"]
    assert "lightly is left out" in capsys.readouterr().out


def test_speeds_are_images_over_seconds_and_ratios_of_the_same_repeat() -> None:
    timings = {"slow": measuring.Timing((2.0, 4.0, 8.0)), "fast": measuring.Timing((1.0, 1.0, 2.0))}
    figures = pretext.speeds(timings, 8, "slow")
    assert figures["slow"]["images_per_second"]["median"] == 2.0
    assert figures["fast"]["images_per_second"]["median"] == 8.0
    assert figures["fast"]["ratio"]["median"] == 4.0
    assert figures["slow"]["ratio"]["median"] == 1.0


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    with pytest.raises(FloatingPointError, match="bilevel"):
        pretext._finite("bilevel", torch.tensor(float("nan")))


def test_lightlys_loss_is_the_same_number() -> None:
    """So that both sides of the comparison do the same work."""
    module = pytest.importorskip("lightly.loss")
    first, second = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    expected = module.NTXentLoss(temperature=0.5)(first, second)
    torch.testing.assert_close(nt_xent(first, second, temperature=0.5), expected)
