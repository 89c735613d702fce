"""A downstream task whose metrics are those of torchmetrics, through fine-tuning and its refusals."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from torchmetrics.classification import MulticlassCalibrationError, MulticlassConfusionMatrix

from recipes.bissl.tasks.linear import LinearTask
from recipes.vision.metrics import top_k
from tests.support.recipes.small_runs import execute, of_stage, refused


class Calibrated(LinearTask):
    """Chooses the epoch by the calibration error, which is better when lower."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self) -> Mapping[str, Any]:
        return {"ece": MulticlassCalibrationError(len(self.classes), norm="l1"), "top1": top_k(1)}


class Undirected(Calibrated):
    def metrics(self) -> Mapping[str, Any]:
        return {"confusion": MulticlassConfusionMatrix(len(self.classes))}


def test_fine_tuning_chooses_by_a_metric_of_torchmetrics(tmp_path: Path) -> None:
    options = ["finetune", "--arm=scratch", "--arms=bissl,baseline,scratch", "--seeds=1", "--finetune.validate-every=1"]
    assert execute(*options, "--output-dir", str(tmp_path), f"--downstream.task={__name__}:Calibrated") == 0
    (facts,) = [json.loads(path.read_text()) for path in tmp_path.glob("checkpoints/*/artifact.json")]
    epochs = {line["epoch"]: line["val_ece"] for line in of_stage(tmp_path, "finetune", "epoch")}
    assert (facts["primary_metric"], facts["higher_is_better"]) == ("ece", {"ece": False, "top1": True})
    assert len(set(epochs.values())) > 1
    assert facts["best"]["ece"] == min(epochs.values()) == epochs[facts["best"]["epoch"]]
    assert 0 <= facts["test"]["ece"] <= 1


def test_a_metric_without_a_better_side_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    message = refused(capsys, "--output-dir", str(folder), f"--downstream.task={__name__}:Undirected")
    assert "metrics: 'confusion' is a MulticlassConfusionMatrix, which does not say whether higher" in message
    assert not folder.exists()
