"""What is kept of a step whose numbers are not finite, for a person to look at."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bilevel.checkpoint import write_atomic
from bilevel.checks import check_path
from bilevel.distributed import rank
from bilevel.training.callbacks import Callback, Record
from bilevel.training.data.batches import BatchSource


def write_inspection(path: Path, content: Mapping[str, Any]) -> None:
    """Write nested dictionaries, lists and tuples of tensors, numbers and strings; torch.load(weights_only) reads it.

    Of several ranks the first writes.

    Raises:
        OSError: it cannot be written.
    """
    if rank() > 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    write_atomic(path, buffer.getvalue())


def last_indices(source: BatchSource) -> list[int] | None:
    """The points of the batch that a source gave last; None where it does not say."""
    indices = source.last_indices
    return None if indices is None else indices.tolist()


class Inspect(Callback):
    """Saves what a step whose loss or gradient is not finite was made of, as ``EVENT-step-N.pt`` in a folder.

    A dictionary for ``torch.load(path, weights_only=True)``: the event ("event", "step", "loss", "grad_norm", ...),
    "indices" of the level's batch where its data say (`BatchStack`), "levels" (variables, optimizer and schedule by
    level) as they were before the step, and "kept" (buffers and the like), which the pass may have written unless
    `nonfinite_skips` is above 0.

    Args:
        directory: made where missing.
        prefix: of the files' names.
    """

    def __init__(self, directory: str | Path, *, prefix: str = "") -> None:
        check_path("Inspect: directory", directory)
        self.directory, self.prefix = Path(directory), prefix

    def on_nonfinite(self, trainer: Any, level: str, record: Record) -> str | None:
        path = self.directory / f"{self.prefix}{record['event']}-step-{record['step']}.pt"
        content = {
            **record,
            "indices": last_indices(trainer.levels[level].data),
            "levels": {name: level.state_dict() for name, level in trainer.levels.items()},
            "kept": trainer.kept(),
        }
        write_inspection(path, content)
        return f"indices and state are in {path}"
