"""Trials shared by any number of workers, on one machine or many, in any order.

What there is to try, what is done and what came of it is in an Optuna study, in a database. Who works on what is in
leases, files in the folder of the search, which all workers see as they see the checkpoints: a worker that dies leaves
a running trial without a living lease, and the next one takes it up at its last checkpoint. Optuna's own claims and
heartbeats have no part in it (docs/searching.md says why).
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from bilevel import interruption
from bilevel.checkpoint import write_atomic
from bilevel.training import NonFiniteError, derive_seed

from ..errors import ConfigError
from ..folder.leases import Lease, LeaseLost
from ..folder.run_folder import INSPECT
from ..stage import Attempt, discard_checkpoints
from ..terminal import say
from .choosers import make_pruner, make_sampler
from .plan import NAMED, StudyPlan
from .space import Trial
from .storage import load_optuna, open_storage, reaching, shown
from .trial_record import Scores, TrialRecord

if TYPE_CHECKING:
    from optuna import Study
    from optuna import Trial as OptunaTrial
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

TRIALS, PREPARE = "trials", "prepare"

POLL = 5.0
"""Longest wait before looking again at what other workers have done (s)."""

ID, SCORES, STATUS, MESSAGE = "id", "scores", "status", "message"
"""User attributes of a study's trials. A trial without an id is none of the search's: a worker died as it was made."""

Fit = Callable[[Mapping[str, Any], Attempt], Scores]
"""Trains with a trial's values, from the attempt's newest checkpoint where there is one.

Raises NonFiniteError where training diverges and InvalidValues where the values do not fit each other or what they are
tried on: results too.
"""


class InvalidValues(ValueError):
    """A trial's values, each allowed by itself, do not fit each other or what they are tried on."""


class Pruned(Exception):
    """The pruner has given the trial up."""


def prepare(
    plan: StudyPlan,
    higher_is_better: Callable[[], bool],
    is_done: Callable[[], bool] = lambda: True,
    make: Callable[[], None] = lambda: None,
) -> None:
    """Make the study and what all trials start from, or wait for another worker that does.

    Args:
        higher_is_better: whether a higher score is the better one; asked when the study is made.
        is_done, make: whether what trials start from is there, and the function that makes it; by default nothing is.

    Raises:
        ConfigError: the database does not answer, or holds trials of another search.
    """
    leases = plan.leases
    while not (is_done() and _is_enqueued(plan)):
        lease = leases.take(PREPARE)
        interruption.check()
        if lease is None:
            time.sleep(min(POLL, plan.duration / 4))
            continue
        with lease.kept():
            if not is_done():
                make()
            _enqueue(plan, higher_is_better)


def _is_enqueued(plan: StudyPlan) -> bool:
    if plan.begun() is None:
        return False
    with open_study(plan) as study:
        return plan.trials is None or study.has(plan.trials)


def _enqueue(plan: StudyPlan, higher_is_better: Callable[[], bool]) -> None:
    """Make the study, or what of it is missing: a worker may have died at this."""
    if plan.begun() is None:
        name = f"{plan.directory.resolve().name}-{uuid.uuid4().hex[:8]}"
        direction = "maximize" if higher_is_better() else "minimize"
        with reaching(plan.directory, plan.storage):
            storage = open_storage(plan.directory, plan.storage)
            load_optuna().create_study(storage=storage, study_name=name, direction=direction)
            storage.engine.dispose()
        content = {"study": name, "storage": plan.shown_storage()}
        write_atomic(plan.directory / NAMED, json.dumps(content).encode())
    with open_study(plan) as study:
        study.add(plan.trials or ())


@contextmanager
def open_study(plan: StudyPlan) -> Iterator[TrialStudy]:
    """The study of a search that is prepared, in this process, until the block ends.

    Raises:
        ConfigError: there is none, or its database does not answer.
    """
    name = plan.begun()
    if name is None:
        raise ConfigError(f"{plan.directory} holds no search that was begun")
    with reaching(plan.directory, plan.storage):
        storage = open_storage(plan.directory, plan.storage)
        try:
            yield TrialStudy(plan, _load(plan, name, storage), storage)
        finally:
            storage.remove_session()
            storage.engine.dispose()


def _load(plan: StudyPlan, name: str, storage: RDBStorage) -> Study:
    optuna = load_optuna()
    # Trials that are enumerated ask for no values.
    sampler = optuna.samplers.RandomSampler() if plan.sampler is None else make_sampler(plan.sampler, 0)
    try:
        return optuna.load_study(study_name=name, storage=storage, sampler=sampler, pruner=make_pruner(plan.pruner))
    except KeyError as error:
        raise ConfigError(
            f"search: {shown(plan.directory, plan.storage)} holds no study {name!r}; put the database back, or delete "
            f"{plan.directory / NAMED} to begin the trials anew"
        ) from error


class TrialStudy:
    """The trials of a search, in this process; `open_study` makes it."""

    def __init__(self, plan: StudyPlan, study: Study, storage: RDBStorage) -> None:
        self.plan, self._study, self._storage = plan, study, storage

    def has(self, trials: Collection[Trial]) -> bool:
        """Whether all of these are in the study."""
        known = self._by_id()
        return all(trial.number in known for trial in trials)

    def add(self, trials: Collection[Trial]) -> None:
        """Enqueue those of `trials` that are not in the study yet."""
        optuna, known = load_optuna(), self._by_id()
        for trial in trials:
            if trial.number not in known:
                waiting = optuna.trial.create_trial(
                    state=optuna.trial.TrialState.WAITING,
                    params=dict(trial.values),
                    distributions=dict(self.plan.space),
                    user_attrs={ID: trial.number},
                )
                self._study.add_trial(waiting)

    def records(self) -> list[TrialRecord]:
        """The records of all trials that are done, by number.

        Raises:
            ConfigError: one is of other values.
        """
        known = sorted(self._by_id().items())
        return [self._record(number, found) for number, found in known if found.state.is_finished()]

    def missing(self) -> list[int]:
        """Numbers of the trials that are not done."""
        return self._missing(self._by_id())

    def _missing(self, known: Mapping[int, FrozenTrial]) -> list[int]:
        done = {number for number, found in known.items() if found.state.is_finished()}
        return [number for number in range(self.plan.count) if number not in done]

    def holders(self) -> list[dict[str, Any]]:
        """The processes that work on a trial now, as `Leases.holder` tells them."""
        leases = self.plan.leases
        return [holder for number in self.missing() if (holder := leases.holder(_name(number)))]

    def work(self, fit: Fit, console: Console, *, only: Collection[int] | None = None) -> None:
        """Do trials until none is left, and wait for those of other workers, which may be theirs or become ours.

        Args:
            console: gets a line for each trial.
            only: numbers of the trials to do, or to wait for, instead of all.
        """
        leases = self.plan.leases
        while True:
            known = self._by_id()
            pending = [number for number in self._missing(known) if only is None or number in only]
            if not pending:
                return
            taken = ((number, leases.take(_name(number))) for number in pending)
            number, lease = next(((number, lease) for number, lease in taken if lease is not None), (-1, None))
            if lease is None:
                interruption.check()
                time.sleep(min(POLL, self.plan.duration / 4))
                continue
            with lease.kept():
                self._attempt(number, known.get(number), fit, lease, console)
            interruption.check()

    def sweep(self) -> None:
        """Delete what workers that were killed left behind, once all trials are done."""
        optuna, leases = load_optuna(), self.plan.leases
        for number in range(self.plan.count):
            _discard(self._folder(number))
            leases.clear(_name(number))
        leases.clear(PREPARE)
        counted = {found.number for found in self._by_id().values()}
        for found in self._study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            if found.number not in counted:
                self._study.tell(found.number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)

    def _by_id(self) -> dict[int, FrozenTrial]:
        """The study's trials by the search's numbers: of several with one number the first that is done, if any is.

        Raises:
            ConfigError: one is of other values than the search's.
        """
        known: dict[int, FrozenTrial] = {}
        for found in self._study.get_trials(deepcopy=False):
            number = found.user_attrs.get(ID)
            if number is None or number >= self.plan.count:
                continue
            if number not in known or (found.state.is_finished() and not known[number].state.is_finished()):
                known[number] = found
        for number, found in known.items():
            if self.plan.trials is not None and found.params != self.plan.trials[number].values:
                raise ConfigError(
                    f"search: trial {number} of the study {self._study.study_name!r} is of other values than this "
                    f"search's ({found.params}, not {dict(self.plan.trials[number].values)}); name another folder"
                )
        return known

    def _attempt(self, number: int, known: FrozenTrial | None, fit: Fit, lease: Lease, console: Console) -> None:
        """Do a trial whose lease is held, unless it was finished just before, or the lease is lost on the way."""
        directory = self._folder(number)
        try:
            started = self._started(number, known, lease)
            if started is None:
                return
            trial, reported = started
            directory.mkdir(parents=True, exist_ok=True)
            attempt = Attempt(directory, lease.check, self._report(trial, reported))
            record = _fitted(self._trial(number, trial.params), fit, attempt)
        except LeaseLost as lost:
            say(console, f"trial {number}: {lost}")
            return
        self._tell(trial, record)
        _discard(directory)
        say(console, f"trial {record.describe()}")

    def _started(
        self, number: int, known: FrozenTrial | None, lease: Lease
    ) -> tuple[OptunaTrial, Collection[int]] | None:
        """The trial, now running, and the epochs that it has reported; None where it is done.

        It is one that waits, one that a dead worker left, or, where a sampler draws them, a new one.
        """
        # Another worker may have drawn it, or done it, before the lease was taken.
        optuna, found = load_optuna(), known or self._by_id().get(number)
        if found is None:
            assert self.plan.sampler is not None, "trials that are enumerated are enqueued"
            # A worker that goes on in another's place draws the same.
            self._study.sampler = make_sampler(self.plan.sampler, derive_seed(self.plan.seed, "sampler", number))
            try:
                asked = self._study.ask(dict(self.plan.space))
            except ImportError as error:
                raise ConfigError(f"--sampler: {self.plan.sampler} needs another package ({error})") from error
            lease.check()
            asked.set_user_attr(ID, number)
            return asked, ()
        study_id = self._storage.get_study_id_from_name(self._study.study_name)
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(study_id, found.number)
        found = self._storage.get_trial(trial_id)
        if found.state.is_finished():
            return None
        if found.state == optuna.trial.TrialState.WAITING:
            # `ask` would take whichever trial comes first.
            self._storage.set_trial_state_values(trial_id, optuna.trial.TrialState.RUNNING)
        return optuna.trial.Trial(self._study, trial_id), found.intermediate_values.keys()

    def _report(self, trial: OptunaTrial, reported: Collection[int]) -> Callable[[int, float], None]:
        """Writes an epoch's score to the study, unless an earlier attempt has, and asks the pruner."""
        optuna = load_optuna()

        def report(epoch: int, score: float) -> None:
            if epoch not in reported:
                try:
                    trial.report(score, epoch)
                except optuna.exceptions.UpdateFinishedTrialError as error:
                    raise LeaseLost("finished by the process from which it was taken over") from error
            if self.plan.pruner is not None and trial.should_prune():
                raise Pruned(f"by {self.plan.pruner} after epoch {epoch}")

        return report

    def _tell(self, trial: OptunaTrial, record: TrialRecord) -> None:
        """Write what came of a trial, unless a worker that took it over has done so."""
        optuna = load_optuna()
        try:
            if record.scores is not None:
                trial.set_user_attr(SCORES, asdict(record.scores))
                self._study.tell(trial, record.scores.score, skip_if_finished=True)
                return
            trial.set_user_attr(STATUS, record.status)
            trial.set_user_attr(MESSAGE, record.message)
            # Samplers learn from what was pruned, as they do not from what failed.
            self._study.tell(trial, state=optuna.trial.TrialState.PRUNED, skip_if_finished=True)
        except optuna.exceptions.UpdateFinishedTrialError:
            return

    def _record(self, number: int, found: FrozenTrial) -> TrialRecord:
        """What came of a trial that is done."""
        trial, known = self._trial(number, found.params), found.user_attrs
        if SCORES in known and found.value is not None:
            return TrialRecord(trial, "finished", Scores(**known[SCORES]))
        message = known.get(MESSAGE, "ended outside of the search")
        return TrialRecord(trial, known.get(STATUS, "pruned"), message=message)

    def _trial(self, number: int, params: Mapping[str, Any]) -> Trial:
        """The trial with its values in the order of the space, in which not every database keeps them."""
        return Trial(number, {field: params[field] for field in self.plan.space})

    def _folder(self, number: int) -> Path:
        """Of the trial's checkpoints and events."""
        return self.plan.directory / TRIALS / _name(number)


def _fitted(trial: Trial, fit: Fit, attempt: Attempt) -> TrialRecord:
    try:
        return TrialRecord(trial, "finished", fit(trial.values, attempt))
    except NonFiniteError as error:
        return TrialRecord(trial, "diverged", message=str(error))
    except Pruned as pruned:
        return TrialRecord(trial, "pruned", message=str(pruned))
    except InvalidValues as error:
        return TrialRecord(trial, "invalid", message=str(error))


def _name(number: int) -> str:
    return f"{number:03d}"


def _discard(directory: Path) -> None:
    """Delete the checkpoints of a trial that is done; another process may be at it too."""
    discard_checkpoints(directory)
    for path in directory.glob(f"{INSPECT}/*"):
        path.unlink(missing_ok=True)
