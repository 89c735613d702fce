"""A stage of a run whose finished result is kept on disk, and found there instead of being made again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bilevel import interruption
from bilevel.distributed import rank

from .artifacts import Artifact, ArtifactStore
from .folder.folder_lease import leased


@dataclass(frozen=True)
class Attempt:
    """One process's work on a stage or a trial.

    Attributes:
        directory: where its checkpoints lie; an earlier attempt may have left some.
        check: to be called before each step; raises where another process has taken the work over.
        report: to be called with an epoch's number and its validation score; raises where the work is given up.
    """

    directory: Path
    check: Callable[[], None]
    report: Callable[[int, float], None] = lambda epoch, score: None


Fit = Callable[[Attempt], tuple[Mapping[str, nn.Module], Mapping[str, Any]]]
"""Trains, from the attempt's newest checkpoint where there is one; the modules and the facts that are kept."""


@dataclass(frozen=True)
class CachedStage:
    """One stage in a store of artifacts.

    Attributes:
        key: hash of all that decides the result, as `make_key` gives it.
    """

    store: ArtifactStore
    name: str
    key: str

    def run(self, fit: Fit) -> Artifact:
        """The finished artifact; where there is none, `fit` makes it, while no other process may.

        A signal that asks for a stop waits for the next `interruption.check`.

        Raises:
            ConfigError: another process makes it, and the store does not wait.
        """
        finished = self._find()
        if finished is not None:
            return finished
        directory = self.store.directory(self.name, self.key)
        with interruption.deferred(), leased(directory, "artifacts", waits=self.store.waits) as check:
            # Another process may have finished it in between.
            artifact = self._find()
            if artifact is None:
                modules, facts = fit(Attempt(directory, check))
                artifact = self.store.save(self.name, self.key, modules, facts)
            discard_checkpoints(directory)
        return artifact

    def _find(self) -> Artifact | None:
        return self.store.find(self.name, self.key)


class Tensors(nn.Module):
    """Tensors by name, as a module that a stage may leave."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def discard_checkpoints(directory: Path) -> None:
    """Delete the checkpoints of work that is finished. Rank 0 does so for all."""
    if rank() > 0:
        return
    for path in directory.glob("step-*"):
        path.unlink(missing_ok=True)
