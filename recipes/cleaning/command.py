"""The command line: what is asked for, what is refused before anything is written, and the run."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console
from rich.table import Table as ConsoleTable

from ..experiment.artifacts import ArtifactStore
from ..experiment.command.exit_codes import Endings, end_process, run_command
from ..experiment.command.parsing import Parser, add_run_options, field_options, field_values, hyphenated
from ..experiment.configuration import merge, read_config_file, validated
from ..experiment.errors import ConfigError
from ..experiment.folder.paths import user_path
from ..experiment.folder.run_folder import CHECKPOINTS, METRICS, REPORT, RunDirectory
from ..experiment.ranks.processes import Ranks
from ..experiment.terminal import printable
from ..experiment.workspace import Workspace
from ..vision.errors import DataError
from ..vision.pipeline.workers import WorkerLost
from ..vision.sources.places import check_places
from . import features, fold, outcome
from .data import Pictures
from .ranking import gathered
from .settings import IMAGES, RANKING, Config, run_directory

FOLDER = Path("runs/cleaning")
EXAMPLE = {"data": {"source": "digits", "flips": "pair:0.4"}}
"""Without a source: digits, two in five of which get the label of the next class."""
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

--data, --trusted, --trusted-fraction, --truth and --flips are short for --data.source, --data.trusted and so on. A
config file (TOML or JSON, such as a run's own config.json) changes some fields; options change single ones.

Exit codes: 0 done; 1 a fault of the program or a plug-in; 2 bad input; 3 losses or gradients that are not finite; 74
files that cannot be written; 75 stopped by SIGTERM or SIGUSR1; 76 a worker process is lost; 130 stopped by Ctrl-C.
After 74, 75, 76, 130 and a kill the same command with --resume continues.
"""


@dataclass(frozen=True)
class Request:
    """A parsed command line."""

    config: Config
    directory: RunDirectory
    artifacts: Path
    resume: bool
    overwrite: bool
    dry_run: bool


def parse(arguments: Sequence[str]) -> Request:
    """The request that `arguments` make.

    Raises:
        ConfigError: an unknown option, field or value.
    """
    arguments = [hyphenated(argument, SHORT_NAMES) for argument in arguments]
    early, _ = _base_parser(add_help=False).parse_known_args(arguments)
    directory = run_directory(user_path(early.output_dir or FOLDER))
    file = read_config_file(user_path(early.config)) if early.config else {}
    saved = directory.saved_config() if early.resume and directory.started else None
    parser = _base_parser(add_help=True)
    parser.add_argument("command", nargs="?", default="run", choices=["run"], help="what to do (default: run)")
    source = field_options(parser, Config())
    given = parser.parse_args(arguments)
    values = merge(merge(saved or {}, file), field_values(source, given))
    if "source" not in values.get("data", {}):
        values = merge(EXAMPLE, values)
    config = validated(Config, values)
    if given.resume and given.overwrite:
        raise ConfigError("--resume and --overwrite exclude each other; give one of them")
    artifacts = user_path(given.artifacts) if given.artifacts else directory.path / CHECKPOINTS
    return Request(config, directory, artifacts, given.resume, given.overwrite, given.dry_run)


def _base_parser(*, add_help: bool) -> argparse.ArgumentParser:
    parser = Parser(DESCRIPTION, add_help=add_help)
    add_run_options(parser, str(FOLDER))
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; the process's exit code, as `run_command` gives it."""
    given, threads = sys.argv[1:] if arguments is None else arguments, torch.get_num_threads()
    try:
        return run_command(lambda ranks: _execute(given, ranks), Endings((DataError,), (WorkerLost,)))
    finally:
        torch.set_num_threads(threads)


def _execute(arguments: list[str], ranks: Ranks) -> int:
    request, console = parse(arguments), Console()
    ranks.refuse_several("cleaning")
    config, directory = request.config, request.directory
    device = _device(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    pictures = _checked(request, console)
    if request.dry_run:
        print(config.model_dump_json(indent=1))
        return 0
    workspace = Workspace(directory.path, ArtifactStore(request.artifacts), console, project="cleaning")
    with directory.leased(config, resume=request.resume, overwrite=request.overwrite):
        # First: where a run has started there is a record of its pictures.
        pictures.identity.keep(directory.path / IMAGES)
        (directory.path / METRICS).touch()
        tables = _run(config, pictures, device, workspace, directory)
    for table in tables:
        shown = ConsoleTable(*table.headings, title=table.title)
        for row in table.rows:
            shown.add_row(*map(printable, row))
        console.print(shown)
    _say(console, f"{directory.path / REPORT}, {directory.path / RANKING}")
    return 0


def _checked(request: Request, console: Console) -> Pictures:
    """The pictures, after all that a run checks before it writes: what cannot be read must leave nothing behind."""
    config, directory = request.config, request.directory
    sources = {"data.source": config.data.source, "data.trusted": config.data.trusted or ""}
    check_places({"output-dir": directory.path, "--artifacts": request.artifacts}, sources)
    directory.check(config, resume=request.resume, overwrite=request.overwrite)
    if config.features == "backbone":
        features.backbone_of(config)
    section = config.data.model_copy(update={"download": config.data.download and not request.dry_run})
    pictures = Pictures(config.model_copy(update={"data": section}))
    there = directory.started and not request.overwrite
    pictures.identity.check(directory.path / IMAGES if there else None, lambda line: _say(console, line))
    for seed in range(config.seed, config.seed + config.seeds):
        sets = pictures.sets(seed)
        _say(console, f"seed {seed}: {len(sets.given):,} pictures to look at, {len(sets.labels):,} trusted")
    return pictures


def _run(
    config: Config, pictures: Pictures, device: torch.device, workspace: Workspace, directory: RunDirectory
) -> list[outcome.Table]:
    """All stages, and what they leave for people; the tables of results.

    Raises:
        ConfigError: the page could not be written; everything else was.
    """
    classes, repeats, seconds = len(pictures.data.classes), [], 0.0
    seen = features.run(config, pictures, device, workspace)
    for seed in range(config.seed, config.seed + config.seeds):
        sets = pictures.sets(seed)
        made = [fold.run(config, seen, sets, classes, seed, k, device, workspace) for k in range(config.folds)]
        repeats.append(gathered(made, sets, classes, seed, config.false_alarms))
        seconds += sum(artifact.info["seconds"] for artifact in made)
    results = outcome.summarise(config, pictures, repeats, seconds + seen.info["seconds"], device)
    try:
        outcome.write(config, pictures, repeats, results, directory)
    except ValueError as error:
        raise ConfigError(f"{REPORT} was not written, all other files were: {error}") from error
    return outcome.tables(results)


def _device(config: Config) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for, but torch sees no CUDA device; use --device cpu or auto")
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def _say(console: Console, line: str) -> None:
    """Print a line as it is: brackets are no markup, and a path is not broken."""
    console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def console() -> NoReturn:
    """Run this process's command line and end with its exit code."""
    end_process(main)
