"""The command line: what is asked for, what is refused before anything is written, and the run."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console

from ..experiment.artifacts import ArtifactStore
from ..experiment.command.environment import find_device
from ..experiment.command.exit_codes import Endings, before_a_run, end_process, run_command
from ..experiment.command.run_request import CommandLine, RunRequest
from ..experiment.errors import ConfigError
from ..experiment.folder.run_folder import METRICS, REPORT, RunDirectory
from ..experiment.ranks.processes import Ranks
from ..experiment.tables import print_table
from ..experiment.terminal import counted, say
from ..experiment.workspace import Workspace
from ..vision.errors import DataError
from ..vision.pipeline.workers import WorkerLost
from ..vision.sources.loading import DIGITS
from ..vision.sources.places import check_places
from . import features, fold, outcome
from .data import Pictures
from .notes import beforehand
from .ranking import Repeat, gathered
from .settings import IMAGES, RANKING, Config, run_directory

SHORT_NAMES = {
    "--data": "--data.source",
    "--init-backbone": "--model.init-backbone",
    "--backbone": "--model.backbone",
    **{f"--{name}": f"--data.{name}" for name in ("trusted", "trusted-fraction", "truth", "flips")},
}
DESCRIPTION = """\
Cleaning: the wrong labels of a labelled image set, given a small part of it that is trusted.

    run --data folder:PATH --trusted folder:PATH     a page of suspicious pictures in runs/cleaning
    run                                              the same on scikit-learn's digits with planted wrong labels

A config file (TOML or JSON, such as a run's own config.json) changes some fields; options change single ones.

Exit codes: 0 done; 1 a fault of the program or a plug-in; 2 bad input; 3 losses or gradients that are not finite; 74
files that cannot be written; 75 stopped by SIGTERM or SIGUSR1; 76 a worker process is lost; 130 stopped by Ctrl-C.
After 74, 75, 76, 130 and a kill the same command with --resume continues.
"""


def _example(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Digits, two in five of which get the label of the next class, where neither a source nor a truth is named."""
    data = given.get("data", {})
    # What is no table of fields is refused where all fields are checked.
    if isinstance(data, Mapping) and data.get("trusted") is not None and "source" not in data:
        raise ConfigError("data.trusted: the pictures to look at are missing; name them by --data")
    named = not isinstance(data, Mapping) or not data.keys().isdisjoint(("source", "truth"))
    return {} if named else {"data": {"source": DIGITS, "flips": "pair:0.4"}}


COMMAND_LINE = CommandLine(Config(), DESCRIPTION, Path("runs/cleaning"), run_directory, SHORT_NAMES, _example)


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; the process's exit code, as `run_command` gives it."""
    given, threads = sys.argv[1:] if arguments is None else arguments, torch.get_num_threads()
    try:
        return run_command(lambda ranks: _execute(given, ranks), Endings((DataError,), (WorkerLost,)))
    finally:
        torch.set_num_threads(threads)


def _execute(arguments: list[str], ranks: Ranks) -> int:
    request, console = COMMAND_LINE.parse(arguments), Console()
    ranks.refuse_several("cleaning")
    config, directory = request.config, request.directory
    device = find_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with before_a_run():
        pictures = _checked(request, console)
    if request.dry_run:
        print(config.model_dump_json(indent=1))
        return 0
    workspace = Workspace(directory.path, ArtifactStore(request.artifacts), console, project="cleaning")
    with directory.leased(config, resume=request.resume, overwrite=request.overwrite):
        # First: where a run has started there is a record of its pictures.
        pictures.identity.keep(directory.path / IMAGES)
        (directory.path / METRICS).touch()
        results = _run(config, pictures, device, workspace, directory)
    for table in outcome.tables(results):
        print_table(console, table)
    for line in results["warnings"]:
        say(console, f"note: {line}")
    say(console, f"{directory.path / REPORT}, {directory.path / RANKING}")
    return 0


def _checked(request: RunRequest[Config], console: Console) -> Pictures:
    """The pictures, after all that a run checks before it writes: what cannot be read must leave nothing behind."""
    config, directory = request.config, request.directory
    sources = {"data.source": config.data.source, "data.trusted": config.data.trusted or ""}
    check_places({"output-dir": directory.path, "--artifacts": request.artifacts}, sources)
    directory.check(config, resume=request.resume, overwrite=request.overwrite)
    frozen = config.features
    # A backbone that cannot be used is refused before pictures are read.
    _ = frozen.backbone
    section = config.data.model_copy(update={"download": config.data.download and not request.dry_run})
    pictures = Pictures(config.model_copy(update={"data": section}))
    frozen.check(pictures.data)
    there = directory.started and not request.overwrite
    pictures.identity.check(directory.path / IMAGES if there else None, lambda line: say(console, line))
    for seed in config.repeats:
        sets = pictures.sets(seed)
        say(console, f"seed {seed}: {counted(len(sets.given), 'picture')} to look at, {len(sets.labels):,} trusted")
    # A run tells it once more, with its results.
    for line in beforehand(config, pictures):
        say(console, f"note: {line}")
    return pictures


def _run(
    config: Config, pictures: Pictures, device: torch.device, workspace: Workspace, directory: RunDirectory
) -> dict[str, Any]:
    """All stages, and what they leave for people; the results."""
    repeats, seconds = list[Repeat](), 0.0
    seen = features.run(config, pictures, device, workspace)
    for seed in config.repeats:
        sets = pictures.sets(seed)
        made = [fold.run(config, seen, sets, seed, k, device, workspace) for k in range(config.folds)]
        repeats.append(gathered(made, sets, seed, config.false_alarms))
        seconds += sum(artifact.info["seconds"] - seen.info["seconds"] for artifact in made)
    results = outcome.summarise(config, pictures, repeats, seconds + seen.info["seconds"], device)
    outcome.write(config, pictures, repeats, results, directory)
    return results


def console() -> NoReturn:
    """Run this process's command line and end with its exit code."""
    end_process(main)
