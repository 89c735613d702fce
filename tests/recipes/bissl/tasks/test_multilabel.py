"""Multi-label classification as a downstream task."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from recipes.bissl.tasks.classification import Classification
from recipes.bissl.tasks.multilabel import MultiLabel
from recipes.vision.imagesets import ImageSet
from recipes.vision.networks.backbones import SmallResNet
from tests.support.recipes.label_cases import outputs_on_test, run_with_labels
from tests.support.recipes.small_runs import of_stage

CLASSES = ("cat", "dog", "hen")
SCORES = np.array([[1.0, -2.0, 0.5], [0.3, 0.1, -4.0], [2.0, 2.0, 2.0], [-1.0, 0.0, 1.0]])
PRESENT = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=bool)


def task(**options: Any) -> MultiLabel:
    return MultiLabel(**{"image_size": 8, "classes": CLASSES, **options})


def by_hand(scores: np.ndarray, present: np.ndarray, loss_function: str) -> float:
    total = 0.0
    for o, y in zip(scores, present, strict=True):
        p = 1 / (1 + np.exp(-o)) if loss_function == "bce" else np.exp(o) / np.exp(o).sum()
        if loss_function == "bce":
            total -= sum(np.log(q) if there else np.log(1 - q) for q, there in zip(p, y, strict=True)) / len(o)
        else:
            total -= sum(np.log(q) for q, there in zip(p, y, strict=True) if there)
    return total / len(scores)


@pytest.mark.parametrize("loss_function", ["bce", "softmax"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64], ids=str)
def test_loss_is_its_definition(loss_function: str, dtype: torch.dtype) -> None:
    outputs, targets = torch.from_numpy(SCORES).requires_grad_(), torch.from_numpy(PRESENT).to(dtype)
    loss = task(loss_function=loss_function).loss(outputs, targets)
    assert loss.item() == pytest.approx(by_hand(SCORES, PRESENT, loss_function), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, outputs)
    # Of an image without any class the softmax says nothing.
    assert bool(gradient[1].any()) == (loss_function == "bce")


def test_interface() -> None:
    assert task().loss_function == "bce"
    assert MultiLabel.labels == "multi-label"
    assert Classification.labels == "single-label"
    assert list(task().metrics()) == ["map11"]
    assert task().metrics()["map11"].higher_is_better
    head = task().build(SmallResNet((4,)))
    assert [tuple(p.shape) for p in head.parameters()] == [(3, 4), (3,)]
    assert task().describe()[-1] == "downstream loss: binary cross-entropy, mean over classes"
    assert "softmax" in task(loss_function="softmax").describe()[-1]
    with pytest.raises(ValueError, match="loss_function"):
        task(loss_function="mse")


@pytest.mark.parametrize("loss_function", ["bce", "softmax"])
def test_all_stages(tmp_path: Path, loss_function: str) -> None:
    """Which digit it is, and whether it is odd."""

    def relabel(images: ImageSet) -> Tensor:
        labels = images.labels
        assert labels is not None
        return torch.cat([one_hot(labels, 10), labels[:, None] % 2], dim=1).bool()

    names = (*map(str, range(10)), "odd")
    options = "--downstream.task=recipes.bissl.tasks.multilabel:MultiLabel", "--downstream.eval-batch-size=150"
    choice = f'--downstream.options={{"loss_function": "{loss_function}"}}'
    pipeline, made = run_with_labels(tmp_path, names, relabel, *options, choice)
    info, sets = made["finetune"].info, pipeline.data.downstream
    assert info["primary_metric"] == "map11"
    assert info["best"]["map11"] == max(line["val_map11"] for line in of_stage(tmp_path, "finetune", "epoch"))
    scores = outputs_on_test(pipeline, pipeline.config.downstream_task(names), made["finetune"]).double().numpy()
    assert sets.test.labels is not None
    expected = by_hand(scores, sets.test.labels.numpy(), loss_function)
    assert info["test"]["loss"] == pytest.approx(expected, rel=1e-4)
    assert 0 < info["test"]["map11"] <= 100
