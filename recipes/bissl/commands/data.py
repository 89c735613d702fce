"""``bissl data``: which of the fourteen published data sets are here, whether they are whole, and fetching them."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...experiment.command.parsing import Parser
from ...experiment.folder.paths import user_path
from ...experiment.terminal import command_line, say
from ...vision.errors import DataError
from ...vision.sources.published.catalog import DATASETS
from ...vision.sources.published.dataset import Dataset, fetch_dataset, remedy
from ...vision.sources.published.verify import Verified, verify

_DESCRIPTION = "Which of the fourteen published data sets are here, whether they are whole, and fetching them."

BAD = 2
SHOWN = 10
SAMPLE = 200


def main(arguments: list[str]) -> int:
    """Run ``bissl data ...``; exit code 0, or 2 where a set that was named, or one on disk, is not whole.

    Raises DataError on an unknown name and on a download that is not possible.
    """
    options = _parser().parse_args(arguments)
    root = user_path(options.root)
    console = Console()
    if options.command == "list":
        console.print(_table(root))
        for dataset in DATASETS.values():
            if not dataset.downloadable and dataset.missing(root):
                say(console, f"{dataset.name}: {remedy(dataset, root)}")
        verify = f"`{command_line()} data verify NAME`"
        say(console, f"{verify} says of any other what is missing, where it is from and where it goes")
        return 0
    if options.command == "download":
        return _download(console, _named(options.name), root)
    if options.sample < 1:
        raise DataError(f"--sample must be at least 1, got {options.sample}")
    chosen = [_named(name) for name in options.names] or list(DATASETS.values())
    codes = [_verify(console, dataset, root, options, bool(options.names)) for dataset in chosen]
    return max(codes)


def _parser() -> Parser:
    """The subcommands and their options."""
    common = Parser(add_help=False)
    common.add_argument("--root", default="data", help="folder of the sets, as the field data.root (default: data)")
    parser = Parser(_DESCRIPTION, command="data")
    commands = parser.add_subparsers(dest="command", required=True, metavar="list | verify | download")
    commands.add_parser(
        "list",
        parents=[common],
        help="all sets, their counts, what is on disk, and how to place what cannot be fetched",
    )
    check = commands.add_parser("verify", parents=[common], help="check files, counts and labels, and decode images")
    check.add_argument("names", nargs="*", metavar="NAME", help="sets to check (default: those that are on disk)")
    amount = check.add_mutually_exclusive_group()
    amount.add_argument(
        "--sample", type=int, default=SAMPLE, help=f"images to decode, chosen at random (default: {SAMPLE})"
    )
    amount.add_argument("--all", action="store_true", help="decode every image")
    check.add_argument("--seed", type=int, default=0, help="seed of that choice (default: 0)")
    fetch = commands.add_parser("download", parents=[common], help="fetch a set, then check it")
    fetch.add_argument("name", metavar="NAME", help="the set")
    return parser


def _named(name: str) -> Dataset:
    """The set of that name. Raises DataError, with all names, on an unknown one."""
    if name not in DATASETS:
        raise DataError(f"there is no published data set {name!r}; there are: {', '.join(DATASETS)}")
    return DATASETS[name]


def _state(dataset: Dataset, root: Path) -> str:
    """What of a set is on disk, by the names of its files alone."""
    missing = len(dataset.missing(root))
    if missing == 0:
        return "yes"
    return "no" if missing == len(dataset.needs) else f"in part: {missing} of {len(dataset.needs)} missing"


def _table(root: Path) -> Table:
    """All sets, a row each."""
    table = Table(title=Text(f"published data sets, below {root}"))
    for title in ("name", "classes", "train / val / test", "pretext", "on disk"):
        table.add_column(title, justify="left" if title in ("name", "on disk") else "right", no_wrap=title != "on disk")
    for dataset in DATASETS.values():
        split = " / ".join(f"{number:,}" for number in dataset.split)
        state = _state(dataset, root)
        if state == "no" and not dataset.downloadable:
            state = "no, by hand"
        cells = (dataset.name, str(dataset.classes), split, f"{dataset.pretext:,}", state)
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _verify(console: Console, dataset: Dataset, root: Path, options: argparse.Namespace, named: bool) -> int:
    """Check one set and say what was found; one that is not on disk counts as wrong only where it was named."""
    if not named and _state(dataset, root) == "no":
        say(console, f"{dataset.name}: not on disk")
        return 0
    return _report(
        console, dataset, verify(dataset, root, sample=None if options.all else options.sample, seed=options.seed)
    )


def _report(console: Console, dataset: Dataset, found: Verified) -> int:
    """Print what `verify` found; the exit code."""
    for problem in found.problems[:SHOWN]:
        say(console, f"{dataset.name}: {problem}")
    if len(found.problems) > SHOWN:
        say(console, f"{dataset.name}: and {len(found.problems) - SHOWN:,} more")
    if found.problems:
        return BAD
    say(console, f"{dataset.name}: whole; {found.counted:,} images counted, {found.decoded:,} decoded")
    return 0


def _download(console: Console, dataset: Dataset, root: Path) -> int:
    """Fetch a set where it is not whole, and check it."""
    found = verify(dataset, root, sample=SAMPLE)
    if found.problems:
        if dataset.downloadable:
            say(console, f"{dataset.title}: fetching what {dataset.page} publishes; terms: {dataset.terms}")
        fetch_dataset(dataset, root)
        found = verify(dataset, root, sample=SAMPLE)
    return _report(console, dataset, found)
