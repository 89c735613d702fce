"""Trials shared by any number of workers, on one machine or many, in any order.

All there is to know is in files: which trials there are follows from the seed, which are done from their records, and
who works on what from leases. Workers need no database and no coordinator, and may come and go.
"""

import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bilevel import interruption
from bilevel.checkpoint import write_atomic
from bilevel.training import NonFiniteError

from ..folder.leases import Lease, LeaseLost, Leases
from ..folder.run_folder import INSPECT
from ..stage import Attempt, discard_checkpoints
from .trial_record import Scores, TrialRecord, read_record
from .trials import Trial

TRIALS, LEASES = "trials", "leases"
PREPARE = "prepare"

POLL = 5.0
"""Longest wait before looking again at what other workers have done (s)."""

Fit = Callable[[Mapping[str, float], Attempt], Scores]
"""Trains with a trial's values, from the attempt's newest checkpoint where there is one.

Raises NonFiniteError where training diverges, which is a result too.
"""


@dataclass(frozen=True)
class TrialQueue:
    """The trials of a search in a folder.

    Attributes:
        directory: of the search, the same for all its workers.
        trials: all of them.
        duration: of a lease: seconds after which a silent worker's trial is taken up by another.
    """

    directory: Path
    trials: tuple[Trial, ...]
    duration: float

    @property
    def leases(self) -> Leases:
        """Who works on what."""
        return Leases(self.directory / LEASES, self.duration)

    def record_path(self, trial: Trial) -> Path:
        """Where a trial's record is or will be."""
        return self.directory / TRIALS / f"{_name(trial)}.json"

    def records(self) -> list[TrialRecord]:
        """The records of all trials that are done, by number.

        Raises:
            ConfigError: one cannot be read, or is of other values.
        """
        done = [trial for trial in self.trials if self._is_done(trial)]
        return [read_record(self.record_path(trial), trial) for trial in done]

    def missing(self) -> list[Trial]:
        """The trials that are not done."""
        return [trial for trial in self.trials if not self._is_done(trial)]

    def holders(self) -> list[dict[str, Any]]:
        """The processes that work on a trial now, as `Leases.holder` tells them."""
        leases = self.leases
        return [holder for trial in self.missing() if (holder := leases.holder(_name(trial)))]

    def prepare(self, is_done: Callable[[], bool], make: Callable[[], None]) -> None:
        """See that what all trials start from is made: by this worker, or by another one, for which this one waits."""
        (self.directory / TRIALS).mkdir(parents=True, exist_ok=True)
        while not is_done():
            lease = self.leases.take(PREPARE)
            interruption.check()
            if lease is None:
                self._wait()
                continue
            with lease.kept():
                make()

    def work(self, fit: Fit, console: Console, *, only: Collection[int] | None = None) -> None:
        """Do trials until none is left, and wait for those of other workers, which may be theirs or become ours.

        Args:
            console: gets a line for each trial.
            only: numbers of the trials to do, or to wait for, instead of all.
        """
        leases = self.leases
        while pending := [trial for trial in self.missing() if only is None or trial.number in only]:
            idle = True
            for trial in pending:
                # Looked up again at its turn: others have worked meanwhile.
                lease = None if self._is_done(trial) else leases.take(_name(trial))
                if lease is None:
                    continue
                idle = False
                with lease.kept():
                    self._attempt(trial, fit, lease, console)
            interruption.check()
            if idle:
                self._wait()

    def sweep(self) -> None:
        """Delete what workers that were killed left behind, once all trials are done."""
        for trial in self.trials:
            _discard(self._folder(trial))
            self.leases.clear(_name(trial))
        self.leases.clear(PREPARE)

    def _attempt(self, trial: Trial, fit: Fit, lease: Lease, console: Console) -> None:
        """Do a trial whose lease is held, unless it was finished just before, or the lease is lost on the way."""
        if self._is_done(trial):
            return
        directory = self._folder(trial)
        directory.mkdir(parents=True, exist_ok=True)
        try:
            record = TrialRecord(trial, fit(trial.values, Attempt(directory, lease.check)))
        except NonFiniteError as error:
            record = TrialRecord(trial, message=str(error))
        except LeaseLost as lost:
            console.print(f"trial {trial.number}: {lost}", markup=False, highlight=False, soft_wrap=True)
            return
        write_atomic(self.record_path(trial), json.dumps(record.to_json(), indent=1, allow_nan=False).encode())
        _discard(directory)
        console.print(f"trial {record.describe()}", markup=False, highlight=False, soft_wrap=True)

    def _is_done(self, trial: Trial) -> bool:
        return self.record_path(trial).exists()

    def _folder(self, trial: Trial) -> Path:
        """Of the trial's checkpoints and events."""
        return self.record_path(trial).with_suffix("")

    def _wait(self) -> None:
        time.sleep(min(POLL, self.duration / 4))


def _name(trial: Trial) -> str:
    return f"{trial.number:03d}"


def _discard(directory: Path) -> None:
    """Delete the checkpoints of a trial that is done; another process may be at it too."""
    discard_checkpoints(directory)
    for path in directory.glob(f"{INSPECT}/*"):
        path.unlink(missing_ok=True)
