"""``bissl search``: learning rate and weight decay of a stage, or any fields, chosen on validation data by trials."""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from bilevel.checkpoint import CheckpointError, write_atomic
from bilevel.interruption import Interruption
from bilevel.training import NonFiniteError

from ...experiment.artifacts import Artifact, ArtifactError
from ...experiment.command.parsing import Parser
from ...experiment.configuration import differences, read_config_file
from ...experiment.errors import ConfigError
from ...experiment.folder.paths import user_path
from ...experiment.folder.run_folder import CHECKPOINTS
from ...experiment.plugins import PluginError
from ...experiment.search.choosers import PRUNERS, SAMPLERS, make_pruner, make_sampler
from ...experiment.search.plan import StudyPlan
from ...experiment.search.space import FORMS, Space, Trial, draw, parse_space
from ...experiment.search.storage import check_storage, load_optuna
from ...experiment.search.study import open_study
from ...experiment.search.trial_record import select, value_text
from ...experiment.search.workers import run_workers
from ...experiment.terminal import command_line, command_name, say
from ...experiment.tracking import check_installed
from ...vision.errors import DataError
from ...vision.pipeline.workers import WorkerLost
from ..outcome.checks import check_places, dry_data
from ..outcome.open_run import compute_device
from ..outcome.search.presentation import CHOSEN, SELECTION, lines, table, write_selection
from ..outcome.search.selection import TOLERANCE, near_best
from ..outcome.search.space import LR_RANGE, TRIALS, WEIGHT_DECAY_RANGE, check_space, grid_around, pair_space
from ..outcome.search.variant_search import Search, check, prepare, work
from ..settings.arms import ARMS, BASELINE, EQUAL_TIME, arm_of
from ..settings.run_directory import SAFE_TO_CHANGE
from ..training.costs import read_stage
from ..training.datasets import Datasets
from .parsing import Request, parse, show_config

MANIFEST = "search.json"
UNFINISHED = 1

_DESCRIPTION = """\
A search for the learning rate and weight decay of an arm's fine-tuning, or, with --stage head, of the head's warm-up
and the upper level, or for any fields of the configuration (--space). Trials are scored on the validation set; the test
set is not used. They are a study of Optuna. The same command, on this machine or on others that see the folder,
continues and joins the search. Options of the pipeline (--preset, --arm, --artifacts, --finetune.epochs, ...) are taken
as well, and its fields are those of --space.
"""


def main(arguments: list[str]) -> int:
    """Search as `arguments` say; exit code 0 if all trials that were asked for are done, 1 if workers died before.

    Raises:
        ConfigError, DataError, ArtifactError, PluginError: bad input.
        NonFiniteError: the stage that all trials start from went wrong.
    """
    given, others = _parser().parse_known_args(arguments)
    request = parse(others)
    _check(given, request)
    search, console = _search(given, request), Console()
    check_places(search.config.data, {"output-dir": search.directory, "--artifacts": search.artifacts})
    if request.dry_run:
        parent = _checked(search, given)
        _check_folder(search, _content(search, given))
        check(search, parent, dry_data(search.config), console, published=True)
        print(show_config(search.config))
        for line in _planned(search.plan):
            print(line)
        return 0
    if not given.summary:
        _begin(search, console, given)
        _run(search, console, given)
    elif not (search.directory / MANIFEST).exists():
        raise ConfigError(f"--summary: {search.directory} holds no search")
    return _report(search, console, given)


def _parser() -> Parser:
    listed = f"`{command_line()} --help` lists these options and fields."
    parser = Parser(f"{_DESCRIPTION}{listed}", command="search")
    add: Callable[..., Any] = parser.add_argument
    add("--stage", choices=("finetune", "head"), default="finetune", help="what to search for (default: finetune)")
    add("--from", dest="source", metavar="ARTIFACT", help="artifact to start from (default: the arm's, made if needed)")
    add("--output-dir", metavar="DIR", help="folder of the search (default: runs/PRESET-search-ARM)")
    add("--workers", type=int, default=None, metavar="N", help="worker processes on this machine (default: 1)")
    add("--trial", type=int, default=None, metavar="I", help="do this one trial only, as a job array does")
    add("--summary", action="store_true", help="show how far the search is; run nothing")
    add("--resume", action="store_true", help="continue; the same command always does")
    add(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help=f"score that may be given up for a lower validation loss, in the metric's unit (default: {TOLERANCE:g})",
    )
    add(
        "--lease",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="silence after which a worker's trial is taken up by another (default: 600)",
    )
    _add_trials(parser.add_argument_group("what is tried").add_argument)
    _add_study(parser.add_argument_group("Optuna's study").add_argument)
    grid = parser.add_argument_group("grid around the baseline's fine-tuning rates, for --stage head")
    add = grid.add_argument
    add("--grid-side", type=int, default=3, help="values of each of the two, odd (default: 3)")
    add("--grid-factor", type=float, default=10**0.5, help="between neighbours (default: the square root of 10)")
    return parser


def _add_trials(add: Callable[..., Any]) -> None:
    add(
        "--space",
        action="append",
        default=[],
        metavar="FIELD=FORM",
        help="search this field of the configuration, and others given alike, instead of the pair; forms are "
        f"{FORMS}, such as bissl.upper_lr=log:1e-4:1e-1",
    )
    add("--trials", type=int, default=None, help=f"how many (default: {TRIALS}); may be raised later")
    add("--search-seed", type=int, default=0, help="seed of the trials (default: 0)")
    add(
        "--lr-range",
        type=float,
        nargs=2,
        default=LR_RANGE,
        metavar=("LOW", "HIGH"),
        help="of the pair (default: 1e-4 1)",
    )
    add(
        "--weight-decay-range",
        type=float,
        nargs=2,
        default=WEIGHT_DECAY_RANGE,
        metavar=("LOW", "HIGH"),
        help="of the pair (default: 1e-5 1e-2)",
    )


def _add_study(add: Callable[..., Any]) -> None:
    add(
        "--storage",
        metavar="URL",
        help="database of the study, such as postgresql+psycopg://user@host/name (default: a file in the folder)",
    )
    add(
        "--sampler",
        metavar="NAME",
        help=f"draw each trial after those before: {', '.join(SAMPLERS)} or module:Class (default: all are drawn at "
        "the start, the same for any number of workers)",
    )
    add(
        "--pruner",
        metavar="NAME",
        help=f"give trials up early: {', '.join(PRUNERS)} or module:Class (default: none is)",
    )


def _check(given: argparse.Namespace, request: Request) -> None:
    """Refuse what does not go together."""
    if request.command != "all":
        raise ConfigError(f"search: takes no command, got {request.command!r}")
    if request.overwrite:
        raise ConfigError("--overwrite: a search is not overwritten, others may work on it; delete its folder by hand")
    if given.workers is not None and given.trial is not None:
        raise ConfigError("--workers and --trial exclude each other; give one of them")
    if given.workers is not None and given.workers < 1:
        raise ConfigError(f"--workers: must be at least 1, got {given.workers}")
    if given.stage == "head" and given.trials is not None and not given.space:
        raise ConfigError("--trials: --stage head tries a grid; give --grid-side instead, or --space")
    if given.stage == "head" and given.sampler is not None and not given.space:
        raise ConfigError("--sampler: --stage head tries a grid; give --space, or leave it out")
    if given.trials is not None and given.trials < 1:
        raise ConfigError(f"--trials: must be at least 1, got {given.trials}")
    if given.stage == "head" and arm_of(request.arm).then != "bissl":
        names = ", ".join(name for name, arm in ARMS.items() if arm.then == "bissl")
        raise ConfigError(f"--arm: --stage head belongs to {names}, not to {request.arm!r}")
    if request.arm == EQUAL_TIME and given.source is None:
        raise ConfigError(f"--arm: how long {EQUAL_TIME} trains is known only after others; give --from ARTIFACT")
    if not given.lease > 0 or given.lease == float("inf"):
        raise ConfigError(f"--lease: must be a positive number of seconds, got {given.lease:g}")
    if not given.tolerance >= 0:
        raise ConfigError(f"--tolerance: must be 0 or above, got {given.tolerance:g}")


def _search(given: argparse.Namespace, request: Request) -> Search:
    load_optuna()
    config, of = request.config, "head" if given.stage == "head" else request.arm
    space, trials, count = _tried(given, request)
    if given.trial is not None and not 0 <= given.trial < count:
        raise ConfigError(f"--trial: there are trials 0 to {count - 1}, got {given.trial}")
    if given.sampler is not None:
        make_sampler(given.sampler, given.search_seed)
    make_pruner(given.pruner)
    directory = user_path(given.output_dir or Path("runs") / f"{config.preset}-search-{of}")
    artifacts = request.artifacts or directory / CHECKPOINTS
    chosen = {"storage": given.storage, "sampler": given.sampler, "pruner": given.pruner, "seed": given.search_seed}
    plan = StudyPlan(directory, space, trials, count, given.lease, **chosen)
    return Search(config, artifacts, given.stage, request.arm, plan, given.source is not None)


def _tried(given: argparse.Namespace, request: Request) -> tuple[Space, tuple[Trial, ...] | None, int]:
    """The fields, the trials where they are known from the start, and how many there are to be.

    Raises:
        ConfigError: a field or a range that cannot be searched.
    """
    config = request.config
    if given.stage == "head" and not given.space:
        space, grid = grid_around(config.finetune.rates(BASELINE), side=given.grid_side, factor=given.grid_factor)
        return space, tuple(grid), len(grid)
    count = TRIALS if given.trials is None else given.trials
    if given.space:
        space = parse_space(given.space)
        check_space(space, config, given.stage, request.arm, given=given.source is not None)
    else:
        space = pair_space(tuple(given.lr_range), tuple(given.weight_decay_range))
    if given.sampler is not None:
        return space, None, count
    return space, tuple(draw(space, count, given.search_seed)), count


def _planned(plan: StudyPlan) -> list[str]:
    """What a dry run says about the trials."""
    if plan.trials is None:
        fields = "; ".join(f"{field} from {distribution}" for field, distribution in plan.space.items())
        return [f"{plan.count} trials, drawn one after the other by {plan.sampler}: {fields}"]
    return [
        f"trial {trial.number:03d}: "
        + ", ".join(f"{field} {value_text(value, 6)}" for field, value in trial.values.items())
        for trial in plan.trials
    ]


def _given_artifact(given: argparse.Namespace, search: Search) -> Artifact | None:
    """The artifact of --from, verified."""
    if given.source is None:
        return None
    then = arm_of(search.variant).then
    if arm_of(search.variant).start == "random":
        raise ConfigError(f"--from: the arm {search.variant!r} starts from random weights; leave out one of the two")
    expected = "pretext" if search.stage == "head" or then == "nothing" else then
    artifact = read_stage(user_path(given.source))
    if artifact.stage != expected:
        raise ArtifactError(
            f"--from: search of {search.stage} for the arm {search.variant!r} starts from a {expected} artifact, "
            f"{given.source} is of {artifact.stage}; name another one, or another --arm"
        )
    artifact.tensors()
    return artifact


def _checked(search: Search, given: argparse.Namespace) -> Artifact | None:
    """The artifact of --from, after what costs nothing to check."""
    check_storage(search.directory, search.plan.storage)
    search.plan.begun()
    parent = _given_artifact(given, search)
    compute_device(search.config)
    check_installed(search.config.tracking)
    return parent


def _begin(search: Search, console: Console, given: argparse.Namespace) -> None:
    """Find what is wrong before the folder is touched, then make what all trials start from, or wait for it."""
    parent = _checked(search, given)
    # Let go of when this is done: workers map the cache instead.
    data = Datasets(search.config)
    if not (search.directory / MANIFEST).exists():
        check(search, parent, data, console)
    _open(search, given)
    prepare(search, parent, data, console)


def _open(search: Search, given: argparse.Namespace) -> None:
    """Begin the search in its folder, or join the one that is there if it is the same.

    Raises:
        ConfigError: it is another one, or the folder cannot be written to.
    """
    path, content = search.directory / MANIFEST, _content(search, given)
    _check_folder(search, content)
    try:
        if not path.exists():
            search.directory.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(content, indent=1).encode())
    except OSError as error:
        raise ConfigError(f"output-dir: {search.directory} cannot be written to ({error.strerror})") from error
    # Another worker may have begun one in between.
    _check_folder(search, content)


def _content(search: Search, given: argparse.Namespace) -> dict[str, Any]:
    """What decides the search, for its manifest."""
    settings: dict[str, Any] = {"stage": search.stage, "arm": search.variant}
    settings |= {"sampler": given.sampler, "pruner": given.pruner}
    if given.space:
        to_json = load_optuna().distributions.distribution_to_json
        space = {field: json.loads(to_json(distribution)) for field, distribution in search.plan.space.items()}
        settings |= {"search_seed": given.search_seed, "space": space}
    elif search.stage == "finetune":
        ranges = {"lr_range": list(given.lr_range), "weight_decay_range": list(given.weight_decay_range)}
        settings |= {"search_seed": given.search_seed, **ranges}
    else:
        settings |= {"grid_side": given.grid_side, "grid_factor": given.grid_factor}
    return {"search": settings, "config": json.loads(search.config.model_dump_json())}


def _check_folder(search: Search, content: dict[str, Any]) -> None:
    """Refuse a folder with another search, or with other files."""
    path = search.directory / MANIFEST
    if not path.exists():
        # Hidden files may be those that another worker is just writing.
        if search.directory.is_dir() and any(file.name[0] != "." for file in search.directory.iterdir()):
            raise ConfigError(f"output-dir: {search.directory} holds other files, but no {MANIFEST}; name another")
        return
    changed = differences(read_config_file(path), content)
    refused = [line for line in changed if line.partition(":")[0].removeprefix("config.") not in SAFE_TO_CHANGE]
    if refused:
        raise ConfigError(
            f"output-dir: {search.directory} holds another search:\n  " + "\n  ".join(refused) + "\nName another folder"
        )


def _run(search: Search, console: Console, given: argparse.Namespace) -> None:
    """All missing trials, or one of them."""
    count = given.workers or 1
    if count == 1:
        work(search, console, only=given.trial)
        return
    codes = run_workers(_worker, (search, count), count)
    if codes:
        died = f"{len(codes)} of {count} workers ended early, with {', '.join(map(str, codes))}"
        print(f"{command_name()} search: {died}", file=sys.stderr)


def _worker(given: tuple[Search, int]) -> None:
    """One of so many worker processes; bad input is one line, as in the first."""
    try:
        with Interruption():
            work(given[0], Console(), processes=given[1])
    except (ConfigError, DataError, ArtifactError, PluginError, CheckpointError, NonFiniteError, WorkerLost) as error:
        print(f"{command_name()} search: a worker stopped: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _report(search: Search, console: Console, given: argparse.Namespace) -> int:
    """Print what there is; write the selection where every trial is done."""
    if search.plan.begun() is None:
        say(console, "what all trials start from is not made yet")
        return 0
    with open_study(search.plan) as study:
        records, missing = study.records(), study.missing()
        if given.trial is not None and missing:
            return 0
        if missing:
            holders = study.holders()
            say(console, f"{len(records)} of {search.plan.count} trials done, {len(holders)} being worked on")
            for holder in holders:
                say(console, f"  on {holder['host']}, process {holder['pid']}, seen {holder['age']:.0f} s ago")
        if not missing or any(record.scores is not None for record in records):
            selection = select(records, partial(near_best, tolerance=given.tolerance))
            console.print(table(search, selection, console))
            for line in lines(search, selection, given.tolerance):
                say(console, line if not missing else f"so far, {line}")
            if not missing and not given.summary:
                write_selection(search, selection, given.tolerance)
                study.sweep()
                say(console, f"{search.directory / SELECTION}, {search.directory / CHOSEN}")
    return 0 if given.summary or not missing else UNFINISHED
