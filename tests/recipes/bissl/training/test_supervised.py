"""Loss and scores of a backbone with a head."""

import pytest
import torch
from torch import nn

from recipes.bissl.settings.sections import ComputeConfig
from recipes.bissl.tasks.classification import Classification
from recipes.bissl.training.compute import Computing
from recipes.bissl.training.supervised import SupervisedModel
from recipes.vision.shards import Rows


def model(dropout: float = 0.0) -> SupervisedModel:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm1d(6))
    head = nn.Sequential(nn.Dropout(dropout), nn.Linear(6, 3))
    task = Classification(image_size=2, classes=("a", "b", "c"))  # type: ignore[call-arg]
    return SupervisedModel(task, backbone, head, Computing(ComputeConfig(), torch.device("cpu")))


def evaluated() -> list[tuple[Rows, torch.Tensor]]:
    return [(Rows(inputs, len(inputs)), targets) for inputs, targets in batches()]


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 4, generator=generator), torch.arange(n) % 3) for n in (5, 8)]


def test_scores_are_those_of_the_whole_model_in_eval_mode() -> None:
    supervised = model(dropout=0.9)
    supervised.backbone.eval()
    values = supervised.measure(evaluated())
    assert (supervised.backbone.training, supervised.head.training) == (False, True)
    assert int(supervised.backbone.get_buffer("2.num_batches_tracked")) == 0
    supervised.head.eval()
    with torch.no_grad():
        outputs = torch.cat([supervised.head(supervised.backbone(inputs)) for inputs, _ in batches()])
    targets = torch.cat([targets for _, targets in batches()])
    assert values["loss"] == pytest.approx(float(nn.functional.cross_entropy(outputs, targets)), rel=1e-5)
    assert values["top1"] == pytest.approx(100.0 * float((outputs.argmax(1) == targets).double().mean()))


def test_the_loss_is_the_task_s() -> None:
    supervised, plain = model(), model()
    (inputs, targets), _ = batches()
    expected = nn.functional.cross_entropy(plain.head(plain.backbone(inputs)), targets)
    torch.testing.assert_close(supervised.loss((inputs, targets)), expected)
