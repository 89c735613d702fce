"""What a run sets for the whole process: threads, precision, and which of its algorithms torch may take."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...experiment.errors import ConfigError
from ..settings.sections import ComputeConfig

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""Environment variable that cuBLAS and torch read once, when a process first uses CUDA."""
DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")
"""Its values with which cuBLAS gives the same bits again: buffers of a fixed size for each stream."""


@contextmanager
def settings_kept() -> Iterator[None]:
    """At the block's end, what `apply_settings` and `torch.set_num_threads` have set in it is what it was before.

    But not `WORKSPACE`, which holds for the rest of the process whatever is done about the variable.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    precision = matmul.fp32_precision, cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    flags, threads = (cudnn.benchmark, cudnn.deterministic), torch.get_num_threads()
    algorithms = _algorithms()
    try:
        yield
    finally:
        matmul.fp32_precision, cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]
        cudnn.benchmark, cudnn.deterministic = flags  # type: ignore[attr-defined]
        if _algorithms() != algorithms:
            # Not for nothing: setting them imports torch's compiler, which takes as long as torch.
            torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        torch.set_num_threads(threads)


def _algorithms() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def apply_settings(fields: ComputeConfig, device: torch.device) -> None:
    """Set what the section `compute` says about the process; precision and cuDNN's search are CUDA's alone."""
    cudnn = torch.backends.cudnn
    if device.type == "cuda":
        precision = "tf32" if fields.tf32 else "ieee"
        torch.backends.cuda.matmul.fp32_precision = precision
        cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]
        cudnn.benchmark = fields.cudnn_benchmark
    if fields.deterministic:
        torch.use_deterministic_algorithms(True)
        cudnn.deterministic = True


def fix_workspace() -> None:
    """Give cuBLAS buffers of a fixed size, before this process first uses CUDA.

    Raises:
        ConfigError: it has done so already, or the environment asks for other buffers.
    """
    given = os.environ.get(WORKSPACE)
    if given is None and torch.cuda.is_initialized():
        raise ConfigError(
            f"compute.deterministic: {WORKSPACE} is not set, and this process has used CUDA already, after which "
            f"cuBLAS does not look at it; set it to {DETERMINISTIC_WORKSPACES[0]} in the environment before the "
            "process starts, or the field to false"
        )
    if given is not None and given not in DETERMINISTIC_WORKSPACES:
        raise ConfigError(
            f"compute.deterministic: {WORKSPACE} is {given!r} in the environment, with which cuBLAS does not give the "
            f"same bits again; unset it, or set it to {' or '.join(DETERMINISTIC_WORKSPACES)}"
        )
    os.environ.setdefault(WORKSPACE, DETERMINISTIC_WORKSPACES[0])


def without_deterministic_form(error: RuntimeError) -> str | None:
    """What to say where `error` is torch's refusal of an operation under `compute.deterministic`; else None."""
    found = re.match(r"(\S+) does not have a deterministic implementation", str(error))
    if found is None:
        return None
    return (
        f"compute.deterministic: {found[1]}, which the network, a view or a loss uses, has no deterministic form on "
        "this device; use another layer in its place, or set the field to false"
    )
