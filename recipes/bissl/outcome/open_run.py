"""What a run in this process needs to begin, and a finished one found again in its folder."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from bilevel import SolverWarning
from bilevel.distributed import rank

from ...experiment.artifacts import Artifact, ArtifactError, ArtifactStore
from ...experiment.command.environment import find_device
from ...experiment.errors import ConfigError
from ...experiment.folder.run_folder import CHECKPOINTS, CONFIG, METRICS, SPLITS, RunDirectory
from ...experiment.ranks.processes import Launch, Ranks
from ...experiment.terminal import say
from ...experiment.workspace import Workspace
from ..settings.arms import BASELINE, EQUAL_TIME, METHOD, arm_of
from ..settings.config import Config, build_config
from ..settings.presets import PRESETS
from ..settings.run_directory import IMAGES, PROJECT, run_directory
from ..training.compute import Computing
from ..training.costs import STEPS
from ..training.datasets import MADE_FROM, Datasets
from ..training.torch_settings import apply_settings, fix_workspace
from .pipeline import Pipeline
from .rank_checks import check_ranks

ALONE = Ranks(Launch())
"""The only process of its run."""


class Unfinished(ArtifactError):
    """A stage is not in the store of a finished run."""


class FinishedStages(ArtifactStore):
    """A store of a finished run: a stage that is not in it is an error instead of something to train."""

    @classmethod
    def of(cls, store: ArtifactStore) -> "FinishedStages":
        """The same artifacts."""
        return cls(store.folder, store.facts)

    def find(self, stage: str, key: str) -> Artifact:
        artifact = super().find(stage, key)
        if artifact is None:
            raise Unfinished(
                f"{self.folder} holds no finished {stage} artifact of this run ({stage}-{key}); finish the run with "
                "--resume, or name the folder of its stages by --artifacts"
            )
        return artifact


def compute_device(config: Config, launch: Launch = ALONE.launch) -> torch.device:
    """The device that the config asks for; of several GPUs the one with this process's number on its machine.

    Raises:
        ConfigError: torch does not see it, or it cannot be made deterministic any more.
    """
    found = find_device(config.device)
    if found.type == "cpu":
        return found
    if config.compute.deterministic:
        fix_workspace()
    if launch.world_size == 1:
        return found
    if launch.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK: this machine has {torch.cuda.device_count()} GPUs, but a process number {launch.local_rank} "
            "(from 0) was started on it; start at most one a GPU"
        )
    torch.cuda.set_device(launch.local_rank)
    return torch.device("cuda", launch.local_rank)


def crops_on(device: torch.device) -> str:
    """How a new run crops images in memory where it has the choice."""
    return "float" if device.type == "cuda" else "uint8"


def make_pipeline(
    config: Config,
    folder: Path,
    store: ArtifactStore,
    data: Datasets | None = None,
    *,
    ranks: Ranks = ALONE,
    console: Console | None = None,
) -> Pipeline:
    """The pipeline of a run in this process, whose threads, precision and algorithms it sets (`settings_kept` around it
    puts them back), and which joins the other `ranks`.

    Args:
        folder: the run's.
        data: may be another run's.
        console: shows the progress; by default the terminal of rank 0 does.

    Raises:
        ConfigError: the device is not there, or the ranks cannot make this run together.
    """
    device = compute_device(config, ranks.launch)
    config = config.with_crops(crops_on(device))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    ranks.join(device, config.rank_timeout)
    check_ranks(config, device)
    if rank() > 0:
        # Rank 0 says it for all.
        warnings.simplefilter("ignore", SolverWarning)
    apply_settings(config.compute, device)
    computing = Computing(config.compute, device)
    workspace = Workspace(folder, store, console or Console(quiet=rank() > 0), config.tracking, PROJECT)
    return Pipeline(config, Datasets(config) if data is None else data, computing, workspace)


def check_images(data: Datasets, directory: RunDirectory, console: Console, *, overwrite: bool = False) -> None:
    """Compare the images with those that the run in `directory` was started with, if any; nothing is written there.

    Raises:
        DataError: they changed, in which way, or the record cannot be read.
    """
    there = directory.started and not overwrite
    data.identity.check(directory.path / IMAGES if there else None, partial(say, console))


def check_parent_images(parent: Artifact, config: Config, data: Datasets) -> None:
    """Refuse to go on from what was made of other images of the same source; another source is a transfer.

    Raises:
        ArtifactError: it was.
    """
    _check_same_images(parent, MADE_FROM[0], config.data.pretext, lambda: data.identity.pretext)
    # Of other labelled images some may have been learnt from that are tested on now.
    _check_same_images(parent, MADE_FROM[1], config.data.downstream, lambda: data.identity.labelled)


def _check_same_images(parent: Artifact, which: str, source: str, digest: Callable[[], str]) -> None:
    made = parent.info.get(which, {})
    if made.get("source") != source or made.get("digest") == digest():
        return
    what = which.replace("_", " ")
    raise ArtifactError(
        f"--from: {parent.directory} was made from {made['images']:,} {what} of {made['source']}, which are not those "
        "of now: files have been added, removed, renamed or changed, or other fields of data choose among them and "
        "hold others out. Give it the same images, or make it anew"
    )


def begin(data: Datasets, directory: RunDirectory) -> None:
    """Write what every run leaves before its first stage."""
    # First: where a run has started there is a record of its images.
    data.identity.keep(directory.path / IMAGES)
    if rank() == 0:
        (directory.path / METRICS).touch()
    directory.write_json(SPLITS, data.downstream.indices)


def config_of(run: Path) -> Config:
    """The configuration that is saved in a run's folder.

    Raises:
        ConfigError: there is none, or it is of no run of this program.
    """
    saved = run_directory(run).saved_config()
    if saved is None:
        raise ConfigError(f"{run} holds no {CONFIG} of a run; name the output folder of a run")
    preset = saved["preset"]
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ConfigError(f"{run}: the saved config names the preset {preset!r}; there are {', '.join(PRESETS)}")
    return build_config(PRESETS[preset]("v2"), saved)


def open_finished(run: Path, artifacts: Path | None = None) -> Pipeline:
    """The pipeline of a finished run, in which no stage can be trained.

    Args:
        run: The run's folder.
        artifacts: The folder of its stages, where they are not in the run's own.

    Raises:
        ConfigError: as `config_of` and `make_pipeline`.
    """
    return make_pipeline(config_of(run), run, FinishedStages(artifacts or run / CHECKPOINTS, STEPS))


def before_finetuning(pipeline: Pipeline, arms: Sequence[str], seed: int) -> dict[str, Artifact]:
    """What each of `arms` fine-tunes in the repeat `seed` of a finished run: the paper compares these (section 4.4).

    The lower-level backbone after the bilevel stage, and the baseline's after its pre-training, are "backbone" in them.

    Raises:
        ArtifactError: a stage is not finished or damaged.
        ConfigError: the run has no such arm or seed, or the arm starts from random weights.
    """
    config = pipeline.config
    seeds = range(config.seed, config.seed + (config.pipeline_seeds or 1))
    if seed not in seeds:
        raise ConfigError(f"--seed: stages before fine-tuning were made for {', '.join(map(str, seeds))}, not {seed}")
    for arm in arms:
        if arm not in config.arms:
            raise ConfigError(f"--arms: the run has {', '.join(config.arms)}, not {arm!r}")
        if arm_of(arm).start == "random":
            raise ConfigError(f"--arms: {arm} has random weights before fine-tuning; leave it out")
    # How long the arm of equal time trained is seen from those two.
    needed = dict.fromkeys((METHOD, BASELINE, *arms) if EQUAL_TIME in arms else arms)
    made: dict[str, Artifact | None] = {}
    for arm in needed:
        made[arm] = pipeline.pretrain(pipeline.at(arm, seed), made)
    return {arm: artifact for arm in arms if (artifact := made[arm]) is not None}
