"""A search for the learning rate and weight decay of a stage: its trials, made by any number of workers, in any order.

All there is to know is in files: which trials there are follows from the seed, which are done from their records, and
who works on what from leases. Workers need no database and no coordinator, and may come and go.
"""

import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from bilevel import interruption
from bilevel.checkpoint import write_atomic
from bilevel.training import NonFiniteError

from ....experiment.artifacts import Artifact
from ....experiment.errors import ConfigError
from ....experiment.folder.leases import Lease, LeaseLost, Leases
from ....experiment.folder.run_folder import INSPECT
from ...settings.arms import arm_of
from ...settings.config import Config
from ...settings.run_directory import run_directory
from ...training.artifacts import artifact_store, read_stage
from ...training.context import Context, Datasets
from ...training.stages import finetune, head, pretext
from ..estimate import check_data, check_labelled
from ..execution import make_context
from ..pipeline import pretrain
from .image_cache import CachedImages, cache_folder, write_cache
from .selection import TrialRecord
from .trials import SearchStage, Trial, rate_fields, with_pair

TRIALS, LEASES, PARENT = "trials", "leases", "parent.json"
PREPARE = "prepare"

POLL = 5.0
"""Longest wait before looking again at what other workers have done (s)."""


@dataclass(frozen=True)
class Search:
    """One search; everything that a worker process needs.

    Attributes:
        config: the run's; the fields that the search decides are replaced by each trial's.
        directory: folder of the search, the same for all its workers.
        artifacts: folder of finished stages and of the image cache.
        trials: all of them.
        lease: seconds after which a silent worker's trial is taken up by another.
    """

    config: Config
    directory: Path
    artifacts: Path
    stage: SearchStage
    arm: str
    trials: tuple[Trial, ...]
    lease: float

    @property
    def leases(self) -> Leases:
        """Who works on what."""
        return Leases(self.directory / LEASES, self.lease)

    def record_path(self, number: int) -> Path:
        """Where a trial's record is or will be."""
        return self.directory / TRIALS / f"{number:03d}.json"

    def records(self) -> list[TrialRecord]:
        """The records of all trials that are done, by number.

        Raises:
            ConfigError: one cannot be read, or is of another pair.
        """
        done = [trial for trial in self.trials if self.record_path(trial.number).exists()]
        return [read_record(self.record_path(trial.number), trial) for trial in done]

    def missing(self) -> list[Trial]:
        """The trials that are not done."""
        return [trial for trial in self.trials if not self.record_path(trial.number).exists()]

    def context(self, directory: Path, data: Datasets, console: Console) -> Context:
        """The context of the arm at the run's first seed, with metrics in `directory`."""
        context = make_context(self.config, run_directory(directory), artifact_store(self.artifacts), data)
        return replace(context, console=console).at(self.arm, self.config.seed)


def read_record(path: Path, trial: Trial) -> TrialRecord:
    """The record of a trial.

    Raises:
        ConfigError: it cannot be read, or is of another pair.
    """
    remedy = "delete the file to repeat the trial"
    try:
        record = TrialRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} is no record of a trial ({error}); {remedy}") from error
    if (record.trial, record.lr, record.weight_decay) != (trial.number, trial.lr, trial.weight_decay):
        raise ConfigError(f"{path} is of another pair than trial {trial.number} of this search; {remedy}")
    return record


def check(search: Search, given: Artifact | None, data: Datasets, console: Console) -> None:
    """Read the data of a search that is not begun yet; what is wrong must leave nothing behind.

    Raises:
        DataError, ConfigError: naming what is wrong.
    """
    context = search.context(search.directory, data, console)
    pretrains = given is None and arm_of(search.arm).start != "random"
    (check_data if pretrains else check_labelled)(context)


def prepare(search: Search, given: Artifact | None, data: Datasets, console: Console) -> None:
    """Make or find what all trials start from: the artifact and the decoded images. One process does it, others wait.

    Args:
        given: the artifact to start from; None: that of the arm, trained here unless it is among the artifacts.
        data: the images, read where they must be.

    Raises:
        ConfigError: the search was begun from another artifact.
        DataError, ArtifactError, NonFiniteError: as the stages raise them.
    """
    path, images = search.directory / PARENT, cache_folder(search.config, search.artifacts)
    (search.directory / TRIALS).mkdir(parents=True, exist_ok=True)
    while not (path.exists() and images.exists()):
        lease = search.leases.take(PREPARE)
        interruption.check()
        if lease is None:
            time.sleep(min(POLL, search.lease / 4))
            continue
        with lease.kept():
            _make(search, given, path, images, search.context(search.directory, data, console))
    known = _parent(search)
    if given is not None and (known is None or known.key != given.key):
        raise ConfigError(f"--from: {search.directory} was begun from another artifact; name another --output-dir")


def _make(search: Search, given: Artifact | None, path: Path, images: Path, context: Context) -> None:
    """The image cache, then the artifact: what is wrong with labelled data must not be found after pre-training."""
    check_labelled(context)
    if not images.exists():
        write_cache(images, context.data.downstream)
    if not path.exists():
        made = given if given is not None else _pretrained(search, context)
        where = None if made is None else str(made.directory.resolve())
        write_atomic(path, json.dumps({"directory": where}).encode())


def work(search: Search, console: Console, *, only: int | None = None) -> None:
    """Do trials until none is left, and wait for those of other workers, which may be theirs or become ours.

    Args:
        only: the one trial to do instead, or to wait for.
    """
    chosen = {trial.number for trial in search.trials} if only is None else {only}
    parent, leases = _parent(search), search.leases
    data = CachedImages(search.config, cache_folder(search.config, search.artifacts))
    while pending := [trial for trial in search.missing() if trial.number in chosen]:
        idle = True
        for trial in pending:
            # Looked up again at its turn: others have worked meanwhile.
            lease = None if search.record_path(trial.number).exists() else leases.take(_name(trial))
            if lease is None:
                continue
            idle = False
            with lease.kept():
                _attempt(search, trial, parent, data, lease, console)
        interruption.check()
        if idle:
            time.sleep(min(POLL, search.lease / 4))


def sweep(search: Search) -> None:
    """Delete what workers that were killed left behind, once all trials are done."""
    for trial in search.trials:
        _discard(search.record_path(trial.number).with_suffix(""))
        search.leases.clear(_name(trial))
    search.leases.clear(PREPARE)


def _attempt(
    search: Search, trial: Trial, parent: Artifact | None, data: Datasets, lease: Lease, console: Console
) -> None:
    """Do a leased trial, unless it was finished just before, or the lease is lost on the way."""
    path = search.record_path(trial.number)
    if path.exists():
        return
    try:
        record = run_trial(search, trial, parent, data, lease)
    except LeaseLost as lost:
        console.print(f"trial {trial.number}: {lost}", markup=False, highlight=False, soft_wrap=True)
        return
    write_atomic(path, json.dumps(record.to_json(), indent=1, allow_nan=False).encode())
    _discard(path.with_suffix(""))
    console.print(f"trial {describe(record)}", markup=False, highlight=False, soft_wrap=True)


def run_trial(search: Search, trial: Trial, parent: Artifact | None, data: Datasets, lease: Lease) -> TrialRecord:
    """Train with the trial's pair, from its checkpoints where there are some, and score it on validation.

    A numeric failure is a result: a pair at which training diverges.
    """
    directory = search.record_path(trial.number).with_suffix("")
    directory.mkdir(parents=True, exist_ok=True)
    config = with_pair(search.config, trial, search.stage, arm_of(search.arm).rates)
    context = replace(search, config=config).context(directory, data, Console(quiet=True))
    facts = {"trial": trial.number, "lr": trial.lr, "weight_decay": trial.weight_decay}
    try:
        return TrialRecord(**facts, **_scored(search.stage, context, parent, directory, lease))
    except NonFiniteError as error:
        return TrialRecord(**facts, status="diverged", message=str(error))


def _scored(
    stage: SearchStage, context: Context, parent: Artifact | None, directory: Path, lease: Lease
) -> dict[str, Any]:
    """The fields of a record that training decides."""
    if stage == "head":
        assert parent is not None, "a head's warm-up has a backbone"
        warmed = head.fit(context, parent, directory, check=lease.check)
        # The bilevel stage starts from the last epoch's head, whatever an earlier one was worth.
        metric, higher, epoch = warmed.primary_metric, warmed.higher_is_better, warmed.epochs
        values, steps, seconds = warmed.values, warmed.steps, warmed.seconds
    else:
        fitted = finetune.fit(context, parent, directory, check=lease.check)
        best = dict(fitted.facts["best"])
        metric, epoch, values = fitted.facts["primary_metric"], int(best.pop("epoch")), best
        higher, steps, seconds = fitted.facts["higher_is_better"][metric], fitted.steps, fitted.seconds
    common = {"metric": metric, "higher_is_better": higher, "steps": steps, "seconds": seconds}
    if not (math.isfinite(values[metric]) and math.isfinite(values["loss"])):
        message = f"validation: {metric} {values[metric]}, loss {values['loss']}"
        return {**common, "status": "diverged", "message": message}
    others = {name: value if math.isfinite(value) else None for name, value in values.items()}
    found = {"epoch": epoch, "score": values[metric], "loss": values["loss"], "values": others}
    return {**common, "status": "finished", **found}


def describe(record: TrialRecord) -> str:
    """One line on a trial."""
    pair = f"{record.trial:03d}: lr {record.lr:.4g}, weight decay {record.weight_decay:.4g}"
    if record.status == "diverged":
        return f"{pair}: diverged ({record.message})"
    return f"{pair}: {record.metric} {record.score:.4g}, loss {record.loss:.4g} at epoch {record.epoch}"


def chosen_fields(search: Search, record: TrialRecord) -> dict[str, dict[str, float]]:
    """The configuration fields, by section, that a trial stands for."""
    return {
        section: {rate: record.lr, decay: record.weight_decay}
        for section, rate, decay in rate_fields(search.stage, arm_of(search.arm).rates)
    }


def _name(trial: Trial) -> str:
    return f"{trial.number:03d}"


def _discard(directory: Path) -> None:
    """Delete the checkpoints of a trial that is done; another process may be at it too."""
    for path in (*directory.glob("step-*"), *directory.glob(f"{INSPECT}/*")):
        path.unlink(missing_ok=True)


def _pretrained(search: Search, context: Context) -> Artifact | None:
    return pretext.run(context) if search.stage == "head" else pretrain(context, {})


def _parent(search: Search) -> Artifact | None:
    """What the trials start from, None for random weights."""
    path = search.directory / PARENT
    try:
        where = json.loads(path.read_text(encoding="utf-8"))["directory"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); delete it to look for the artifact again") from error
    return None if where is None else read_stage(Path(where))
