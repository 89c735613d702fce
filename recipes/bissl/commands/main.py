"""The command line as a whole: which command, and what is said."""

import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import NoReturn

from bilevel.distributed import rank

from ...experiment.artifacts import Artifact, ArtifactError
from ...experiment.command.exit_codes import Endings, before_a_run, end_process, run_command
from ...experiment.folder.run_folder import CHECKPOINTS, REPORT, RESULTS, RunDirectory
from ...experiment.ranks.agreement import check_same
from ...experiment.ranks.processes import Ranks, first_on_each_machine
from ...experiment.terminal import say
from ...experiment.tracking import check_installed
from ...vision.errors import DataError
from ...vision.pipeline.workers import WorkerLost
from ..outcome import checks, estimate
from ..outcome.checks import Checked, check_parent, check_places, dry_data
from ..outcome.console_table import comparison_lines, results_table
from ..outcome.open_run import (
    begin,
    check_images,
    check_parent_images,
    compute_device,
    crops_on,
    make_pipeline,
)
from ..outcome.pipeline import Pipeline
from ..outcome.rank_checks import check_data
from ..outcome.reading_words import start_lines
from ..outcome.side_by_side.all_stages import run_whole
from ..outcome.side_by_side.workers import prepare_workers, worker_count
from ..outcome.wording import number_text
from ..settings.arms import arm_of
from ..settings.config import Config
from ..settings.presets import list_presets
from ..training.costs import artifact_store, read_stage
from ..training.torch_settings import settings_kept, without_deterministic_form
from . import data, export, features, figure2, search, table
from .parsing import Request, parse, show_config

ENDINGS = Endings(bad_input=(DataError,), lost=(WorkerLost,), explained=without_deterministic_form)
TOOLS: dict[str, Callable[[list[str]], int]] = {
    "data": data.main,
    "search": search.main,
    "table": table.main,
    "figure2": figure2.main,
    "features": features.main,
    "export": export.main,
}
"""Subcommands besides the stages."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; the process's exit code, as `run_command` gives it."""
    given = sys.argv[1:] if arguments is None else arguments
    with settings_kept():
        return run_command(partial(_chosen, given), ENDINGS)


def _chosen(arguments: list[str], ranks: Ranks) -> int:
    """Run a subcommand, or a stage or all of them."""
    if arguments and arguments[0] in TOOLS:
        ranks.refuse_several(arguments[0])
        return TOOLS[arguments[0]](arguments[1:])
    return _execute(parse(arguments), ranks)


def run_stage(pipeline: Pipeline, request: Request, parent: Artifact | None) -> None:
    """One stage alone, from the artifact that the command line names."""
    config, console = pipeline.config, pipeline.workspace.console
    if request.command == "finetune":
        seeds = [config.seed + i for i in range(config.pipeline_seeds or config.seeds)]
        for artifact in [pipeline.finetune(pipeline.at(request.arm, seed), parent) for seed in seeds]:
            scores = ", ".join(f"{name} {number_text(value)}" for name, value in artifact.info["test"].items())
            say(console, f"seed {artifact.info['seed']}: test {scores}")
            say(console, f"artifact: {artifact.directory}")
        return
    repeat = pipeline.at(request.arm, config.seed)
    if parent is None:
        made = pipeline.pretext(repeat)
    else:
        stages = {"restart": pipeline.restart, "head": pipeline.head, "bissl": pipeline.bissl}
        made = stages[request.command](repeat, parent)
    say(console, f"artifact: {made.directory}")


def _execute(request: Request, ranks: Ranks) -> int:
    directory = request.directory
    config = _settled(request.config, directory, ranks)
    if request.list_presets:
        print(list_presets())
        return 0
    if request.dry_run:
        ranks.refuse_several("--dry-run")
    with before_a_run():
        pipeline, parent, checked = _checked(request, config, ranks)
        # It reads images, which may be damaged.
        told = estimate.describe(config, checked, pipeline.data) if request.dry_run else ""
    if request.dry_run:
        _save_config(request, config)
        print(show_config(config))
        print(told)
        return 0
    data, console = pipeline.data, pipeline.workspace.console
    with (
        closing(data.workers),
        directory.leased(config, resume=request.resume, overwrite=request.overwrite),
    ):
        if request.command != "all":
            begin(data, directory)
            run_stage(pipeline, request, parent)
            return 0
        results = run_whole(pipeline, directory)
    console.print(results_table(results))
    for line in comparison_lines(results):
        say(console, line)
    say(console, f"{directory.path / REPORT}, {directory.path / RESULTS}")
    return 0


def _checked(request: Request, config: Config, ranks: Ranks) -> tuple[Pipeline, Artifact | None, Checked]:
    """The pipeline, what a single stage starts from, and what was read, after all that a run checks before it writes.

    What cannot be read must leave nothing behind, and nothing lost. A dry run checks the same, but fetches no data.
    """
    directory, artifacts = request.directory, request.artifacts or request.directory.path / CHECKPOINTS
    check_places(config.data, {"output-dir": directory.path, "--artifacts": artifacts})
    check_installed(config.tracking)
    data = dry_data(config) if request.dry_run else None
    pipeline = make_pipeline(config, directory.path, artifact_store(artifacts), data, ranks=ranks)
    if request.command == "all" and not request.dry_run:
        prepare_workers(worker_count(config, pipeline.computing.device))
    check_same({"command": request.command, "arm": request.arm}, "was started for something else")
    parent = _parent(request)
    if not request.dry_run:
        with first_on_each_machine(ranks.launch):
            pipeline.data.read()
        check_data(pipeline.data)
        if rank() == 0:
            directory.check(config, resume=request.resume, overwrite=request.overwrite)
        check_images(pipeline.data, directory, pipeline.workspace.console, overwrite=request.overwrite)
        for line in start_lines(pipeline.data):
            say(pipeline.workspace.console, line)
    checked = checks.check_data(config, pipeline.data, pipeline.computing, published=request.dry_run)
    if parent is not None:
        check_parent(parent, request.command, config, checked.classes)
        if checked.whole:
            check_parent_images(parent, config, pipeline.data)
    return pipeline, parent, checked


def _save_config(request: Request, config: Config) -> None:
    """Leave the config in the folder, unless a run is there that --overwrite would replace."""
    directory = request.directory
    directory.check(config, resume=request.resume, overwrite=request.overwrite)
    if not (request.overwrite and directory.started):
        with directory.leased(config, resume=request.resume, overwrite=False):
            pass


def _settled(config: Config, directory: RunDirectory, ranks: Ranks) -> Config:
    """The config without an open choice: a run goes on as it began, also on another device."""
    saved = directory.saved_config() if directory.started else None
    began = (saved or {}).get("compute", {}).get("crops", "auto")
    return config.with_crops(began).with_crops(crops_on(compute_device(config, ranks.launch)))


def _parent(request: Request) -> Artifact | None:
    """The artifact that the command line names, of the stage that is needed."""
    if request.parent is None:
        return None
    artifact = read_stage(request.parent)
    # Fine-tuning takes the rates of its arm, so that weights of another one would be tuned with the wrong ones.
    then = arm_of(request.arm).then
    fine_tuned = "pretext" if then == "nothing" else then
    expected = {"head": "pretext", "restart": "pretext", "bissl": "head", "finetune": fine_tuned}[request.command]
    if artifact.stage != expected:
        raise ArtifactError(
            f"--from: {request.command} of the arm {request.arm!r} starts from a {expected} artifact, {request.parent} "
            f"is of {artifact.stage}; name another one, or another --arm"
        )
    return artifact


def console() -> NoReturn:
    """Run this process's command line and end with its exit code."""
    end_process(main)
