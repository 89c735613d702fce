"""The stages of a small run on a device, computed in each of the ways that `compute` offers, and resumed."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from recipes.bissl.training.torch_settings import apply_settings, settings_kept
from recipes.vision.losses import nt_xent
from recipes.vision.optimizers import LARS
from tests.support.cases import vector
from tests.support.recipes.small_runs import (
    STAGES,
    before_steps,
    execute,
    leave_out_report,
    run_all,
    small_config,
    small_pipeline,
    stop_at,
    weights,
    whole_run,
)

WAYS = {
    "float32, kept graphs": ("--bissl.hvp=reverse-kept", "--bissl.graph-memory=0.01"),
    "TF32, chunks, crops on the host": ("--compute.tf32=true", "--compute.micro-batch=8", "--compute.crops=uint8"),
    "bfloat16, channels last, crops on the device": (
        "--compute.precision=bf16",
        "--compute.channels-last=true",
        "--compute.crops=float",
    ),
}


@pytest.fixture
def precision() -> Iterator[None]:
    """Puts back what a run sets for the process."""
    with settings_kept():
        yield


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("way", WAYS)
def test_every_stage_is_made(way: str, tmp_path: Path, device: torch.device) -> None:
    config = small_config(f"--device={device.type}", "--seeds=1", "--finetune.epochs=1", *WAYS[way])
    pipeline = small_pipeline(tmp_path, config)
    assert pipeline.computing.device.type == device.type
    apply_settings(config.compute, device)
    made = run_all(pipeline)
    assert list(made) == list(STAGES)
    for artifact in made.values():
        assert all(bool(tensor.isfinite().all()) for tensor in artifact.tensors().values())
    assert all(math.isfinite(value) for value in made["finetune"].info["test"].values())


@pytest.mark.usefixtures("precision")
def test_a_run_interrupted_in_the_bilevel_stage_resumes_to_the_bit(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out_report(monkeypatch)
    options = f"--device={device.type}", "--seeds=1", "--finetune.epochs=1", "--compute.deterministic=true"
    whole = whole_run(tmp_path / "whole", *options)
    with monkeypatch.context() as patch:
        before_steps(patch, "bissl", stop_at(4))
        assert execute("--output-dir", str(tmp_path / "broken"), *options) == 130
    assert execute("--output-dir", str(tmp_path / "broken"), *options, "--resume") == 0
    assert weights(tmp_path / "broken") == weights(whole)


def test_the_contrastive_loss_and_its_optimizer_are_those_of_the_cpu(device: torch.device) -> None:
    """In float64, to half the digits: less than a rounding to float32 would change."""
    ends = []
    for place in (torch.device("cpu"), device):
        first, second = vector(60, 1).reshape(2, 6, 5).to(place)
        weight = torch.nn.Parameter(vector(25, 2).reshape(5, 5).to(place))
        optimizer = LARS([weight], lr=0.5, momentum=0.9, weight_decay=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            nt_xent(first @ weight, second @ weight, temperature=0.5).backward()
            optimizer.step()
        assert weight.device.type == place.type
        ends.append(weight.detach().cpu())
    eps = torch.finfo(torch.float64).eps
    torch.testing.assert_close(ends[1], ends[0], rtol=eps**0.5, atol=eps**0.5)
