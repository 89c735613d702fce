"""Makes the stages of a run in several processes, which leave them in the run's store for it to find."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bilevel.checkpoint import CheckpointError
from bilevel.distributed import world_size
from bilevel.training import NonFiniteError

from ....experiment.artifacts import ArtifactError
from ....experiment.command.exit_codes import ignore_warnings_of_torch
from ....experiment.errors import ConfigError
from ....experiment.folder.leases import LeaseLost
from ....experiment.folder.run_folder import LOGS
from ....experiment.plugins import PluginError
from ....experiment.side_by_side.pool import run_jobs, start_server
from ....experiment.side_by_side.reporter import Reporter
from ....vision.errors import DataError
from ....vision.pipeline.workers import WorkerLost, available_cores
from ...settings.config import Config
from ...training.costs import artifact_store
from ...training.datasets import Datasets
from ...training.torch_settings import without_deterministic_form
from ..open_run import FinishedStages, Unfinished, make_pipeline
from ..pipeline import Pipeline
from .job_graph import Task, jobs_of

EXPECTED = (
    *(ConfigError, DataError, ArtifactError, PluginError, CheckpointError, LeaseLost, NonFiniteError, WorkerLost),
    OSError,
)
"""Errors that say themselves what is to be done."""


@dataclass(frozen=True)
class Given:
    """What every worker is given.

    Attributes:
        config: the run's, without an open choice.
        folder, artifacts: of the run and of its stages.
        count: of workers, which share this machine.
    """

    config: Config
    folder: Path
    artifacts: Path
    count: int


def worker_count(config: Config, device: torch.device) -> int:
    """Processes that make the stages of a run; 1 where the run itself makes them, one after the other."""
    if config.jobs != "auto":
        return config.jobs
    if device.type != "cpu" or world_size() > 1 or config.threads is None:
        return 1
    return max(1, available_cores() // config.threads)


def prepare_workers(count: int) -> None:
    """Let the process that workers are forked from begin with its imports, which take seconds."""
    if count > 1:
        start_server(__name__)


def make_side_by_side(pipeline: Pipeline, count: int) -> None:
    """Make all stages of a run that are not finished, in `count` processes.

    Raises:
        ConfigError, DataError, ...: as the stages raise them, once all others have saved and ended.
        JobFailed, JobLost, Interrupted: as `run_jobs`.
    """
    jobs, workspace = jobs_of(pipeline), pipeline.workspace
    finished = replace(pipeline, workspace=replace(workspace, store=FinishedStages.of(workspace.store)))
    done = {place for place, job in enumerate(jobs) if _is_done(job.task, finished)}
    if len(done) == len(jobs):
        return
    run_jobs(
        jobs,
        open_worker,
        Given(pipeline.config, workspace.folder, workspace.store.folder, count),
        count=count,
        console=workspace.console,
        logs=workspace.folder / LOGS,
        done=done,
        expected=EXPECTED,
    )


def open_worker(given: Given, reporter: Reporter) -> Callable[[Task], None]:
    """What does the jobs of a run in this process, which reads its images anew."""
    ignore_warnings_of_torch()
    config = given.config
    data, store = Datasets(config, processes=given.count), artifact_store(given.artifacts, waits=True)
    pipeline = make_pipeline(config, given.folder, store, data, console=reporter.console)
    workspace = replace(pipeline.workspace, watch=reporter.watch, shared=True)
    own = replace(pipeline, workspace=workspace)

    def make(task: Task) -> None:
        try:
            task.make(own)
        except RuntimeError as error:
            refused = without_deterministic_form(error)
            if refused is None:
                raise
            raise ConfigError(refused) from error

    return make


def _is_done(task: Task, finished: Pipeline) -> bool:
    try:
        task.make(finished)
    except Unfinished:
        return False
    return True
