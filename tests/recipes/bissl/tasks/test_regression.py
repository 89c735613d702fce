"""Regression as a downstream task."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_absolute_error, r2_score
from torch import Tensor, nn

from recipes.bissl.tasks.regression import Regression
from recipes.vision.errors import DataError
from recipes.vision.imagesets import ImageSet
from recipes.vision.networks.backbones import SmallResNet
from tests.support.recipes.label_cases import outputs_on_test, run_with_labels
from tests.support.recipes.small_runs import of_stage

RNG = np.random.default_rng(0)
OUTPUTS, TARGETS = RNG.normal(size=(6, 2)), 2 * RNG.normal(size=(6, 2))


def task(**options: Any) -> Regression:
    return Regression(**{"image_size": 8, "classes": ("age", "weight"), **options})


def huber(error: float) -> float:
    return 0.5 * error**2 if abs(error) < 1 else abs(error) - 0.5


PENALTIES = {"mse": np.square, "l1": np.abs, "smooth_l1": np.vectorize(huber)}


@pytest.mark.parametrize("loss_function", PENALTIES)
@pytest.mark.parametrize("scale", [None, (0.5, 4.0)], ids=["plain", "scaled"])
def test_loss_is_its_definition(loss_function: str, scale: tuple[float, float] | None) -> None:
    found = task(loss_function=loss_function, target_std=scale, target_mean=(5.0, 6.0) if scale else None)
    loss = found.loss(torch.from_numpy(OUTPUTS), torch.from_numpy(TARGETS))
    errors = (OUTPUTS - TARGETS) / (scale or (1.0, 1.0))
    assert np.abs(errors).max() > 1 > np.abs(errors).min()
    assert loss.item() == pytest.approx(PENALTIES[loss_function](errors).mean(), rel=1e-6)


def test_outputs_are_in_the_units_of_the_targets() -> None:
    torch.manual_seed(0)
    backbone, inputs = nn.Flatten(), torch.randn(4, 3, dtype=torch.float64)
    head = nn.Linear(3, 2).double()
    plain = task().forward(backbone, head, inputs)
    torch.testing.assert_close(plain, head(inputs))
    scaled = task(target_mean=(100.0, -3.0), target_std=(10.0, 0.5)).forward(backbone, head, inputs)
    expected = plain * torch.tensor([10.0, 0.5]) + torch.tensor([100.0, -3.0])
    torch.testing.assert_close(scaled, expected)


def test_half_precision_outputs_keep_the_means_precision() -> None:
    head = nn.Linear(3, 2).bfloat16()
    outputs = task(target_mean=(1000.5, 0.0), target_std=(0.01, 1.0)).forward(
        nn.Flatten(), head, torch.zeros(1, 3, dtype=torch.bfloat16)
    )
    assert outputs.dtype == torch.float32
    assert abs(float(outputs.detach()[0, 0]) - 1000.5) < 0.02


def test_interface() -> None:
    assert Regression.labels == "regression"
    assert {name: metric.higher_is_better for name, metric in task().metrics().items()} == {"mae": False, "r2": True}
    assert next(iter(task().metrics())) == "mae"
    head = task().build(SmallResNet((4,)))
    assert [tuple(p.shape) for p in head.parameters()] == [(2, 4), (2,)]
    assert "squared error of targets as they are" in task().describe()[-1]
    assert "absolute error of targets scaled" in task(loss_function="l1", target_std=(1.0, 2.0)).describe()[-1]


def test_refusals() -> None:
    for bad in ((1.0, 0.0), (-1.0, 1.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="target_std"):
            task(target_std=bad)
    for name in ("target_mean", "target_std"):
        with pytest.raises(DataError, match=rf"{name}: has 3 values, but the data have 2 targets \(age, weight\)"):
            task(**{name: (1.0, 2.0, 3.0)}).build(SmallResNet((4,)))


def test_all_stages(tmp_path: Path) -> None:
    """The digit, and a hundred times its brightness."""

    def relabel(images: ImageSet) -> Tensor:
        assert images.labels is not None
        return torch.stack([images.labels, 100 * images.images.stacked().float().mean(dim=(1, 2, 3)) / 255], dim=1)

    names = ("digit", "brightness")
    options = '{"target_mean": [4.5, 30], "target_std": [3, 10], "loss_function": "smooth_l1"}'
    arguments = "--downstream.task=recipes.bissl.tasks.regression:Regression", f"--downstream.options={options}"
    pipeline, made = run_with_labels(tmp_path, names, relabel, *arguments, "--downstream.eval-batch-size=150")
    info = made["finetune"].info
    assert info["primary_metric"] == "mae"
    assert info["higher_is_better"] == {"mae": False, "r2": True}
    assert info["best"]["mae"] == min(line["val_mae"] for line in of_stage(tmp_path, "finetune", "epoch"))
    labels = pipeline.data.downstream.test.labels
    assert labels is not None
    found = outputs_on_test(pipeline, pipeline.config.downstream_task(names), made["finetune"]).double().numpy()
    true = labels.double().numpy()
    assert info["test"]["mae"] == pytest.approx(mean_absolute_error(true, found), rel=1e-4)
    assert info["test"]["r2"] == pytest.approx(r2_score(true, found), rel=1e-3)
    errors = (found - true) / (3, 10)
    assert info["test"]["loss"] == pytest.approx(PENALTIES["smooth_l1"](errors).mean(), rel=1e-4)
