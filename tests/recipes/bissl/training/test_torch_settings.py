"""What a run sets for its process, when it must be set, and that it is put back."""

import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recipes.bissl.outcome import open_run
from recipes.bissl.outcome.open_run import compute_device, make_pipeline
from recipes.bissl.settings.sections import ComputeConfig
from recipes.bissl.tasks.simclr import SimCLR
from recipes.bissl.training.costs import artifact_store
from recipes.bissl.training.torch_settings import (
    WORKSPACE,
    apply_settings,
    fix_workspace,
    settings_kept,
    without_deterministic_form,
)
from recipes.experiment.errors import ConfigError
from recipes.experiment.ranks.processes import Launch
from tests.support.recipes.small_runs import execute, refused, small_config, small_pipeline, weights

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def settings() -> dict[str, Any]:
    """All that a run may set."""
    return {
        "matmul": torch.backends.cuda.matmul.fp32_precision,
        "conv": torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        "benchmark": torch.backends.cudnn.benchmark,
        "cudnn": torch.backends.cudnn.deterministic,
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
    }


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Whatever is set here goes with the test.
    monkeypatch.setenv(WORKSPACE, "")
    monkeypatch.delenv(WORKSPACE)
    with settings_kept():
        yield


APPLIED = [
    ({}, CPU, {}),
    ({}, CUDA, {"matmul": "ieee", "conv": "ieee"}),
    ({"tf32": True}, CPU, {}),
    ({"tf32": True}, CUDA, {"matmul": "tf32", "conv": "tf32"}),
    ({"cudnn_benchmark": True}, CPU, {}),
    ({"cudnn_benchmark": True}, CUDA, {"matmul": "ieee", "conv": "ieee", "benchmark": True}),
    ({"deterministic": True}, CPU, {"cudnn": True, "algorithms": True}),
    ({"deterministic": True}, CUDA, {"matmul": "ieee", "conv": "ieee", "cudnn": True, "algorithms": True}),
]


@pytest.mark.parametrize(("fields", "device", "changed"), APPLIED)
def test_what_is_set_and_that_it_is_put_back(
    fields: dict[str, Any], device: torch.device, changed: dict[str, Any]
) -> None:
    before = settings()
    with warnings.catch_warnings(), settings_kept():
        warnings.simplefilter("error")
        apply_settings(ComputeConfig(**fields), device)
        assert settings() == before | changed
    assert settings() == before


def test_the_cudnn_search_of_a_run_before_is_not_inherited() -> None:
    torch.backends.cudnn.benchmark = True
    apply_settings(ComputeConfig(), CUDA)
    assert not torch.backends.cudnn.benchmark


def test_settings_are_put_back_after_an_error_too() -> None:
    before = settings()

    @settings_kept()
    def stopped() -> None:
        apply_settings(ComputeConfig(deterministic=True, tf32=True), CUDA)
        torch.set_num_threads(before["threads"] + 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert settings() == before


def test_the_two_are_refused_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--compute.deterministic=true", "--compute.cudnn-benchmark=true"
    error = refused(capsys, *options, "--output-dir", str(tmp_path / "run"))
    assert "cudnn_benchmark: cuDNN's fastest convolution" in error
    assert "set one of them to false" in error
    assert not (tmp_path / "run").exists()


def test_a_workspace_is_fixed_before_cuda_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the one that names the device, before it makes it the current one."""
    seen: list[str | None] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(os.environ.get(WORKSPACE)))
    ranked = Launch(1, 2, 1, "127.0.0.1", 29500)
    compute_device(small_config("--device=cuda"), ranked)
    assert seen == [None]
    compute_device(small_config("--device=cuda", "--compute.deterministic=true"), ranked)
    assert seen == [None, ":4096:8"]
    # A CPU needs none.
    monkeypatch.delenv(WORKSPACE)
    compute_device(small_config("--device=cpu", "--compute.deterministic=true"))
    assert WORKSPACE not in os.environ


@pytest.mark.parametrize("value", [":4096:8", ":16:8"])
@pytest.mark.parametrize("used", [False, True])
def test_a_workspace_of_the_environment_is_kept(value: str, used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    monkeypatch.setenv(WORKSPACE, value)
    fix_workspace()
    assert os.environ[WORKSPACE] == value


def test_a_workspace_that_comes_too_late_or_is_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match=r"compute.deterministic: CUBLAS_WORKSPACE_CONFIG is not set, and this proc"):
        fix_workspace()
    assert WORKSPACE not in os.environ
    for used in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda used=used: used)
        for value in (":4096:2", "", "4096"):
            monkeypatch.setenv(WORKSPACE, value)
            with pytest.raises(
                ConfigError, match=rf"CUBLAS_WORKSPACE_CONFIG is '{value}' in the environment.*unset it"
            ):
                fix_workspace()


def test_a_pipeline_sets_them_before_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    class Watched(open_run.Computing):
        def __init__(self, *given: Any) -> None:
            seen.append(torch.are_deterministic_algorithms_enabled())
            super().__init__(*given)

    monkeypatch.setattr(open_run, "Computing", Watched)
    config = small_config("--compute.deterministic=true", "--device=cpu")
    make_pipeline(config, tmp_path, artifact_store(tmp_path))
    assert seen == [True]


class Putting(SimCLR):  # type: ignore[misc]
    """Uses an operation that has no deterministic form on any device."""

    def loss(self, backbone: nn.Module, heads: Any, batch: Any) -> Tensor:
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
        return super().loss(backbone, heads, batch)

    def outputs(self, backbone: nn.Module, heads: Any, batch: Any) -> Any:
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
        return super().outputs(backbone, heads, batch)


def test_an_operation_without_a_deterministic_form_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = settings()
    options = "pretext", f"--pretext.task={__name__}:Putting", "--output-dir", str(tmp_path / "run")
    assert execute(*options, "--compute.deterministic=true") == 2
    error = capsys.readouterr().err
    assert re.search(
        r"^run.py: error: compute.deterministic: put_, which the network, a view or a loss uses", error, re.M
    )
    assert "Traceback" not in error
    assert settings() == before
    assert execute(*options, "--overwrite") == 0
    assert without_deterministic_form(RuntimeError("CUDA error: out of memory")) is None


def test_a_deterministic_run_on_a_cpu_is_the_run_and_records_it(tmp_path: Path) -> None:
    before = settings()
    for name, options in {"plain": (), "strict": ("--compute.deterministic=true",)}.items():
        assert execute("--output-dir", str(tmp_path / name), "--seeds=1", *options) == 0
        assert settings() == before
    plain, strict = (weights(tmp_path / name) for name in ("plain", "strict"))
    # The same bits under other keys: what any algorithm may have made does not stand for what one must have.
    assert sorted(plain.values()) == sorted(strict.values())
    assert not plain.keys() & strict.keys()
    assert '"deterministic": true' in (tmp_path / "strict" / "config.json").read_text()


def test_only_what_may_change_a_result_belongs_to_a_key() -> None:
    plain, strict = ComputeConfig(), ComputeConfig(deterministic=True)
    assert ComputeConfig(cudnn_benchmark=True).decisive() == plain.decisive()
    assert strict.decisive() == {**plain.decisive(), "deterministic": True}
    assert plain.decisive("micro_batch").keys() == plain.decisive().keys() - {"micro_batch"}
    assert plain.decisive() == ComputeConfig().model_dump(exclude={"cudnn_benchmark", "deterministic"})
    assert ComputeConfig(tf32=True).decisive() != plain.decisive()


def test_deterministic_steps_give_the_same_bits_again(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As the suite has it from its start: other tests of this process may have used the device.
    monkeypatch.setenv(WORKSPACE, ":4096:8")
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        config = small_config(f"--device={device.type}", "--compute.deterministic=true", "--seeds=1")
        with settings_kept():
            apply_settings(config.compute, device)
            pipeline = small_pipeline(tmp_path / name, config)
            artifact = pipeline.pretext(pipeline.at("bissl", config.seed))
        made.append(artifact.tensors())
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])
