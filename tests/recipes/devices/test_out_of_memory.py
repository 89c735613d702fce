"""Where a stage asks for more memory than a device has, a sentence names what to lower."""

from functools import partial
from pathlib import Path

import pytest
import torch

from tests.support.recipes.small_runs import before_steps, refused, weights

LOWER = {
    "pretext": "compute.micro_batch (null) or pretext.batch_size (24)",
    "head": "downstream.eval_batch_size (512)",
    "bissl": "compute.micro_batch (null) or pretext.batch_size (24) or downstream.batch_size (16) or "
    "bissl.hessian_batches (2)",
    "finetune": "downstream.eval_batch_size (512)",
}


def ask_for_too_much(device: torch.device) -> None:
    torch.empty(2**50, dtype=torch.uint8, device=device)


@pytest.mark.parametrize("stage", LOWER)
def test_a_stage_names_what_to_lower(
    stage: str,
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The error is the allocator's own, and what was made before it is kept."""
    before_steps(monkeypatch, stage, partial(ask_for_too_much, device))
    arguments = "--output-dir", str(tmp_path), f"--device={device.type}", "--compute.crops=uint8"
    message = refused(capsys, *arguments)
    assert f"error: {stage}: {device} has too little memory for an allocation of" in message
    assert f"; lower {LOWER[stage]}" in message
    assert "Begin another --output-dir with them; --artifacts keeps the stages that they do not concern" in message
    made = {name.partition("-")[0] for name in weights(tmp_path)}
    assert made == set(list(LOWER)[: list(LOWER).index(stage)])


def test_another_run_goes_on_from_the_stages_that_were_made(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        before_steps(patch, "head", partial(ask_for_too_much, device))
        refused(capsys, "--output-dir", str(tmp_path / "first"), f"--device={device.type}")
    before = weights(tmp_path / "first")

    def no_step() -> None:
        raise AssertionError("the pretext stage is made again")

    before_steps(monkeypatch, "pretext", no_step)
    store = tmp_path / "first" / "checkpoints"
    arguments = "--output-dir", str(tmp_path / "second"), f"--artifacts={store}", "--downstream.eval-batch-size=64"
    before_steps(monkeypatch, "finetune", partial(ask_for_too_much, device))
    assert "error: finetune: " in refused(capsys, *arguments, f"--device={device.type}")
    assert before.items() < weights(tmp_path / "first").items()
