"""The benchmark of Hessian-vector products: a short run, and the figures it derives."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.hvp import run as hvp
from benchmarks.hvp.models import Case, convolutional, perceptron, transformer
from benchmarks.measuring import Timing

CPU = torch.device("cpu")


def test_a_quick_run_keeps_figures_and_shows_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [
        Case("MLP", lambda: perceptron(8, 16), 16, 8, contrastive=False),
        Case("conv net", lambda: convolutional(4), 8, 8, contrastive=True),
    ]
    monkeypatch.setattr(hvp, "cases", lambda *, quick: small if quick else [])
    hvp.main(["--quick", "--json", str(tmp_path / "hvp.json")])
    figures = json.loads((tmp_path / "hvp.json").read_text(encoding="utf-8"))
    assert figures["quick"]
    assert figures["environment"]["torch"] == torch.__version__
    assert list(figures["kept_over_recomputed"]) == ["MLP, 16 images of 8x8", "conv net, 8 images of 8x8"]
    perceptron_row, conv_row = figures["cases"]
    # 192 x 16 + 16, 16 x 16 + 16, 16 x 10 + 10.
    assert perceptron_row["parameters"] == 3088 + 272 + 170
    assert set(conv_row["providers"]) == set(hvp.PROVIDERS) - {"Gauss-Newton"}
    for row in figures["cases"]:
        for name in ("reverse", "reverse, kept graph", "forward"):
            assert row["providers"][name]["error"] < 1e-4
        for each in row["providers"].values():
            assert 0.0 < each["gradients"]["q1"] <= each["gradients"]["median"] <= each["gradients"]["q3"]
        # What is kept is there while the second product is made, beside all that the product itself needs.
        peak = row["gradient_peak_bytes"] + row["providers"]["reverse, kept graph"]["bytes_above_gradient"]
        assert peak > row["graph_bytes"] > 0
        assert row["operators"]
    # Of a loss and network with curvature of its own, the Gauss-Newton matrix is not the Hessian.
    assert perceptron_row["providers"]["Gauss-Newton"]["error"] > 1e-3
    assert "kept over" in capsys.readouterr().out


def test_kept_over_recomputed_counts_the_first_product() -> None:
    times = {
        "first": Timing((10.0, 20.0)),
        "reverse, kept graph": Timing((5.0, 5.0)),
        "reverse": Timing((10.0, 10.0)),
    }
    found = hvp.kept_over_recomputed(times)
    assert found["later"]["median"] == 0.5
    # (10 + 4 * 5) / 50 and (20 + 4 * 5) / 50.
    assert found["five"]["median"] == pytest.approx(0.7)


def test_cases_are_the_same_numbers_in_both_precisions_and_composed_of_their_parts() -> None:
    for case in (
        Case("small ViT", lambda: transformer(16), 4, 16, contrastive=False),
        Case("conv net", lambda: convolutional(4), 8, 8, contrastive=True),
    ):
        single, lower = case.objective(torch.float32, CPU)
        double, point = case.objective(torch.float64, CPU)
        assert all(torch.equal(lower[n].double(), point[n]) for n in lower)
        assert float(single({}, lower)) == pytest.approx(float(double({}, point)), rel=1e-4)
        whole = single.outputs({}, lower)
        half = torch.cat([chunk({}, lower) for chunk in single.split(case.batch // 2)])
        torch.testing.assert_close(half, whole, rtol=1e-4, atol=1e-5)
