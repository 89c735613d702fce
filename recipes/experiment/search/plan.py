"""What a search tries, where, and how its workers share it."""

import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..folder.leases import Leases
from .space import Space, Trial
from .storage import shown

LEASES = "leases"
NAMED = "study.json"
"""Which study it is, and in which database."""


@dataclass(frozen=True)
class StudyPlan:
    """What a search tries and how its workers share it; it travels to other processes.

    Attributes:
        directory: of the search, the same for all its workers.
        space: the fields, and what their values are from.
        trials: all trials, where they are known from the start.
        count: how many there are to be.
        duration: of a lease: seconds after which a silent worker's trial is taken up by another.
        storage: URL of the study's database; None: a file in the directory.
        sampler: draws the trials one after the other instead, see `make_sampler`.
        pruner: gives hopeless trials up, see `make_pruner`.
        seed: of the sampler.
    """

    directory: Path
    space: Space
    trials: tuple[Trial, ...] | None
    count: int
    duration: float
    storage: str | None = None
    sampler: str | None = None
    pruner: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        assert (self.trials is None) == (self.sampler is not None), "trials are enumerated, or a sampler draws them"
        assert self.trials is None or len(self.trials) == self.count

    @property
    def leases(self) -> Leases:
        """Who works on what."""
        return Leases(self.directory / LEASES, self.duration)

    def begun(self) -> str | None:
        """The name of the study, None before `prepare` has made it.

        Raises:
            ConfigError: it cannot be read, or the search was begun in another database.
        """
        path = self.directory / NAMED
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            name, storage = content["study"], content["storage"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path} cannot be read ({error}); put it back, or name another folder") from error
        if storage != self.shown_storage():
            raise ConfigError(
                f"--storage: the search in {self.directory} keeps its trials in {storage or 'its own folder'}, not in "
                f"{self.shown_storage() or 'its own folder'}; give the same one"
            )
        return name

    def shown_storage(self) -> str | None:
        """The URL without its password."""
        return None if self.storage is None else shown(self.directory, self.storage)
