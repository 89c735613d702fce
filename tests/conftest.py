"""How the suite runs: a thread a process, on every core, a file that is named in the process that was asked, and what
concerns devices on the CPU and, where there is one, on a GPU."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported, and for every process that a test starts. More threads than cores make each wait for others.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read by cuBLAS when it starts; without it torch refuses its products where algorithms are to be deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

MOST_WORKERS = 8


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Workers of ``-n auto``: none where only files are named, whose tests then run here."""
    if all(Path(argument.partition("::")[0]).is_file() for argument in config.args):
        return 0
    return min(os.cpu_count() or 1, MOST_WORKERS)


@pytest.fixture(
    params=[pytest.param("cpu", marks=pytest.mark.rehearsal), pytest.param("cuda", marks=pytest.mark.gpu)],
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a test of devices computes: once on the CPU, so that its lines are known to run, and once on a GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture(autouse=True, scope="session")
def called_as_the_script() -> Iterator[None]:
    """Messages begin with the name of the command that runs; for tests that call it inside this process, ``run.py``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["recipes/bissl/run.py"])
        yield
