"""Where a run keeps what it makes, and where it shows its progress."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from bilevel.distributed import rank
from bilevel.training import Callback, TrackerError

from .artifacts import ArtifactStore
from .errors import ConfigError
from .events import StageEvents
from .folder.run_folder import INSPECT, METRICS, TRACKING
from .tracking import make_trackers


@dataclass(frozen=True)
class Workspace:
    """The folder of a run, its store of finished stages, and its terminal.

    Attributes:
        folder: with the run's events, its viewers' files and the batches of steps that went wrong.
        store: of finished stages; several runs may share it.
        tracking, project: names of the viewers that get the events too, and of the project there: see `make_trackers`.
        watch: gives, for the title of a training, a callback that shows elsewhere how far it is.
        shared: whether other processes write the events of their stages to the folder meanwhile.
    """

    folder: Path
    store: ArtifactStore
    console: Console = field(default_factory=Console)
    tracking: Collection[str] = ()
    project: str = "bilevel"
    watch: Callable[[str], Callback] | None = None
    shared: bool = False

    @property
    def metrics(self) -> Path:
        """The file of all events."""
        return self.folder / METRICS

    @property
    def inspect(self) -> Path:
        """The folder of batches that were no good."""
        return self.folder / INSPECT

    def events(self, fields: Mapping[str, Any], settings: Mapping[str, Any]) -> StageEvents:
        """Where a stage's events go.

        Args:
            fields: what tells the stage's events from all others.
            settings: the run's configuration, which some viewers show.

        Raises:
            ConfigError: the package of a viewer is not installed.
        """
        folder = self.folder / TRACKING
        try:
            viewers = {} if rank() > 0 else make_trackers(self.tracking, folder, fields, settings, project=self.project)
        except TrackerError as error:
            raise ConfigError(f"tracking: {error}") from error
        return StageEvents(self.metrics, fields, viewers, shared=self.shared)
