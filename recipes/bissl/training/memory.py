"""A stage that needs more memory than there is: the error says what to lower."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...experiment.errors import ConfigError
from ..settings.config import Config

_SIGNS = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""Of errors that torch raises as a plain RuntimeError."""


@contextmanager
def out_of_memory_explained(
    stage: str, settings: Config, device: torch.device, advice: str | None = None
) -> Iterator[None]:
    """Turns an allocation that fails in a stage into an error that names the fields to lower.

    Args:
        advice: what else to do, as the last sentence; by default fewer jobs, where there are several.

    Raises:
        ConfigError: the device, or the host, has too little memory.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(sign in str(error) for sign in _SIGNS):
            raise
        size = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.I)
        asked = f" for an allocation of {size[1]}" if size else ""
        if advice is None:
            advice = "" if settings.jobs == 1 else "Fewer jobs change no result, and --resume goes on with them"
        further = advice and f". {advice}"
        raise ConfigError(
            f"{stage}: {device} has too little memory{asked}; lower {' or '.join(fields_to_lower(stage, settings))}. "
            f"Begin another --output-dir with them; --artifacts keeps the stages that they do not concern{further}"
        ) from error


def fields_to_lower(stage: str, settings: Config) -> list[str]:
    """The fields that decide how much memory a stage takes, with their values; those that change no result first."""
    c, compute = settings.bissl, settings.compute
    pretext, labelled = stage in ("pretext", "restart", "bissl"), stage in ("head", "bissl", "finetune")
    found = [] if settings.jobs == 1 else [f"jobs ({settings.jobs})"]
    if stage == "bissl" and c.hvp in ("reverse-kept", "auto"):
        found.append(f"bissl.graph_memory ({_value(c.graph_memory)})")
    if stage in ("head", "finetune"):
        found.append(f"downstream.eval_batch_size ({settings.downstream.eval_batch_size})")
    if compute.crops == "float":
        found.append("compute.crops from float to uint8")
    if pretext:
        found.append(f"compute.micro_batch ({_value(compute.micro_batch)})")
        found.append(f"pretext.batch_size ({settings.pretext.batch_size})")
    if labelled:
        found.append(f"downstream.batch_size ({settings.downstream.batch_size})")
    if stage == "bissl":
        found.append(f"bissl.hessian_batches ({c.hessian_batches})")
    return found


def _value(number: float | None) -> str:
    return "null" if number is None else f"{number:g}"
