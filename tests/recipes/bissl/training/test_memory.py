"""Which errors are taken for a lack of memory, and which fields are named."""

import pytest
import torch

from recipes.bissl.training.memory import fields_to_lower, out_of_memory_explained
from recipes.experiment.errors import ConfigError
from tests.support.recipes.small_runs import small_config

CUDA = torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("error", "size"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has ..."), " of 2.50 GiB"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), None),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), None),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes."), " of 7 bytes"),
    ],
)
def test_allocators_errors_are_explained(error: RuntimeError, size: str | None) -> None:
    asked = f" for an allocation{size}" if size else ""
    with (
        pytest.raises(ConfigError, match=f"bissl: cuda:1 has too little memory{asked}; lower ") as found,
        out_of_memory_explained("bissl", small_config(), CUDA),
    ):
        raise error
    assert found.value.__cause__ is error


@pytest.mark.parametrize("error", [RuntimeError("shapes cannot be multiplied"), ValueError("memory")])
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as found, out_of_memory_explained("bissl", small_config(), CUDA):
        raise error
    assert found.value is error


@pytest.mark.parametrize(
    ("stage", "options", "expected"),
    [
        ("pretext", ("--compute.micro-batch=12",), ["compute.micro_batch (12)", "pretext.batch_size (24)"]),
        (
            "pretext",
            ("--jobs=3", "--threads=1"),
            ["jobs (3)", "compute.micro_batch (null)", "pretext.batch_size (24)"],
        ),
        ("restart", (), ["compute.micro_batch (null)", "pretext.batch_size (24)"]),
        (
            "head",
            ("--compute.crops=float",),
            [
                "downstream.eval_batch_size (512)",
                "compute.crops from float to uint8",
                "downstream.batch_size (16)",
            ],
        ),
        (
            "bissl",
            ("--bissl.hvp=reverse-kept", "--bissl.graph-memory=0.5"),
            [
                "bissl.graph_memory (0.5)",
                "compute.micro_batch (null)",
                "pretext.batch_size (24)",
                "downstream.batch_size (16)",
                "bissl.hessian_batches (2)",
            ],
        ),
        ("finetune", (), ["downstream.eval_batch_size (512)", "downstream.batch_size (16)"]),
    ],
)
def test_the_fields_of_each_stage(stage: str, options: tuple[str, ...], expected: list[str]) -> None:
    assert fields_to_lower(stage, small_config(*options)) == expected


@pytest.mark.parametrize(
    ("jobs", "advice", "ending"),
    [
        (1, None, "do not concern"),
        (3, None, "do not concern. Fewer jobs change no result, and --resume goes on with them"),
        (1, "Fewer apples", "do not concern. Fewer apples"),
    ],
)
def test_fewer_processes_need_no_other_run(jobs: int, advice: str | None, ending: str) -> None:
    with (
        pytest.raises(ConfigError) as found,
        out_of_memory_explained("bissl", small_config(f"--jobs={jobs}", "--threads=1"), CUDA, advice),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert str(found.value).endswith(ending)
