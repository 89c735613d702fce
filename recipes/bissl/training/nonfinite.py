"""What a plain stage does about a step whose loss or gradient is not finite."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bilevel import BatchStack
from bilevel.training import NonFiniteError
from bilevel.training.inspection import last_indices, write_inspection

from ...experiment.events import StageEvents
from ...experiment.folder.run_folder import INSPECT


class Stateful(Protocol):
    """Modules, optimizers, schedules, stacks: whatever a checkpoint holds."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state_dict: Any, /) -> Any: ...


class NonFiniteSteps:
    """Makes a stage's steps; leaves out up to `allowed` of them, and saves what each was made of.

    A step that is left out changes no weight, buffer, optimizer or learning rate. The file
    ``inspect/STAGE-ARM-seed-S-step-N.pt`` in the run's folder holds a dictionary for torch.load(weights_only=True): the
    message, "indices" of the batch within the stage's images, and the "state" of all parts.

    Args:
        allowed: how many may be left out in the stage.
        parts: as for `run_steps`; the `BatchStack` among them gives the batches.
        events: whose context names the stage.
    """

    def __init__(self, allowed: int, parts: Mapping[str, Stateful], events: StageEvents) -> None:
        self.allowed, self.parts, self.events, self.skipped = allowed, parts, events, 0

    def make(self, step: Callable[[], dict[str, Any]], number: int) -> dict[str, Any]:
        """The step's event; that of a step that was left out has "skipped", how many there were so far.

        Raises:
            NonFiniteError: naming the file, for one step more than `allowed`.
            OSError: the file cannot be written.
        """
        buffers = [(buffer, buffer.clone()) for buffer in self._buffers()] if self.allowed else []
        try:
            return step()
        except NonFiniteError as error:
            path = self._save(number, str(error))
            if self.skipped >= self.allowed:
                stage = self.events.context["stage"]
                raise NonFiniteError(f"{stage} step {number}: {error}; batch and state are in {path}") from error
        self.skipped += 1
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        return {"loss": math.nan, "lr": math.nan, "grad_norm": math.nan, "skipped": self.skipped}

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.skipped = state["skipped"]

    def _buffers(self) -> list[Tensor]:
        modules = [part for part in self.parts.values() if isinstance(part, nn.Module)]
        return [buffer for module in modules for buffer in module.buffers()]

    def _save(self, number: int, message: str) -> str:
        context = self.events.context
        stack = next((part for part in self.parts.values() if isinstance(part, BatchStack)), None)
        content = {
            **context,
            "step": number,
            "message": message,
            "indices": None if stack is None else last_indices(stack),
            "state": {name: part.state_dict() for name, part in self.parts.items()},
        }
        name = "{stage}-{variant}-seed-{seed}".format(**context)
        path = self.events.path.parent / INSPECT / f"{name}-step-{number}.pt"
        write_inspection(path, content)
        return str(path)
