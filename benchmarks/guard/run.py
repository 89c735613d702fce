"""The working tree beside a commit: whether something has become slower, seen before it lands.

    python benchmarks/guard/run.py --against main

Both sides run in processes of their own, in turn: a pair is one process a side, and the order changes from pair to
pair. A ratio is the new time over the old one of the same pair, so that a slow moment of the machine divides out. What
is printed is the median over the pairs with an interval that holds the true median with a probability of at least 0.95
whatever the distribution (the inverted sign test), by seconds of the processor and of the clock.

- ``start-up``: commands from their start to their end (`benchmarks/guard/commands.py`).
- ``alternation``, ``pipeline``, ``small_steps``: the files of `benchmarks/guard/workloads`, small sizes.

Exit code 0; 1 where a slow-down by more than --threshold is certain (the whole interval lies above it), or a row that
the commit can run fails in the working tree, as one does that hangs for ten minutes; 2 for bad input; 130 after Ctrl-C.
A row that the commit cannot run is not comparable, and said so.
"""

import argparse
import math
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.guard.commands import COMMANDS
from benchmarks.guard.pairs import NEW, OLD, Comparison, Row
from benchmarks.guard.trees import CheckoutError, files_of, resolve
from benchmarks.guard.verdict import LEAST_PAIRS, Change
from benchmarks.measuring import environment, show, write_json

ROOT = Path(__file__).resolve().parents[2]
WORKLOADS = {file.stem: file for file in sorted(Path(__file__).with_name("workloads").glob("*.py"))}
STARTS = "start-up"
STARTED = ("import bilevel", "run.py --help", "run.py --dry-run")
GROUPS = (STARTS, *WORKLOADS)
CLOCKS = {"processor": "processor", "clock": "clock"}
FULL, QUICK = {"pairs": 9, "turns": 5}, {"pairs": LEAST_PAIRS, "turns": 3}
BAD_INPUT, INTERRUPTED = 2, 130


def changes(row: Row) -> dict[str, Change]:
    """By both kinds of seconds."""
    return {clock: Change.of(row.ratios(clock)) for clock in CLOCKS}


def verdict(row: Row, threshold: float) -> tuple[str, bool]:
    """In words, and whether it makes the comparison fail: by the clock where that alone is certainly slower."""
    if OLD in row.problem:
        return f"not comparable: {row.problem[OLD]}", False
    if NEW in row.problem:
        return f"fails in the working tree: {row.problem[NEW]}", True
    found = changes(row)
    slow = [clock for clock, change in found.items() if change.is_slower(threshold)]
    if slow and "processor" not in slow:
        return f"{found['clock'].words()} by the clock", True
    return found["processor"].words(), bool(slow)


def compare(comparison: Comparison, groups: Sequence[str], pairs: int) -> list[Row]:
    """The rows of some of `GROUPS`, each of so many pairs."""
    commands = {name: COMMANDS[name] for name in STARTED} if STARTS in groups else {}
    rows = {name: Row(name) for name in commands}
    files = [file for name, file in WORKLOADS.items() if name in groups]
    comparison.starts(commands, rows, -1)
    for number in range(pairs):
        print(f"pair {number + 1} of {pairs}", file=sys.stderr, flush=True)
        comparison.starts(commands, rows, number)
        if files:
            comparison.workloads(files, rows, number)
    return list(rows.values())


def shown(rows: Sequence[Row], threshold: float) -> list[list[str]]:
    """A line a row: seconds, ratios with their intervals, the verdict."""

    def spread(change: Change) -> str:
        return f"{change.median:.3f} ({change.low:.3f} to {change.high:.3f})"

    lines = []
    for row in rows:
        said, _ = verdict(row, threshold)
        if row.problem:
            lines.append([row.name, *("" for _ in CLOCKS), "", said])
        else:
            ratios = changes(row).values()
            lines.append([row.name, f"{row.seconds():.3f}", *map(spread, ratios), said])
    return lines


def record(rows: Sequence[Row], threshold: float) -> dict[str, Any]:
    """For the JSON file."""
    figures: dict[str, Any] = {}
    for row in rows:
        said, fails = verdict(row, threshold)
        figures[row.name] = {"verdict": said, "fails": fails}
        if not row.problem:
            ratios = {clock: change.record() for clock, change in changes(row).items()}
            figures[row.name] |= {"seconds": row.seconds(), "pairs": len(row.pairs), **ratios}
    return figures


def options() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--against", default="HEAD", metavar="COMMIT", help="what to compare with (default: HEAD)")
    made.add_argument("--tree", type=Path, default=ROOT, help="checkout whose working tree is new (default: this one)")
    made.add_argument("--rows", nargs="+", choices=GROUPS, default=list(GROUPS), help="which to run (default: all)")
    made.add_argument("--pairs", type=int, help=f"pairs of each row (default: {FULL['pairs']})")
    made.add_argument("--threshold", type=percentage, default="5%", help="slow-down that is an error (default: 5%%)")
    made.add_argument("--threads", type=int, default=1, help="of each process (default: 1)")
    made.add_argument("--quick", action="store_true", help="fewer pairs and turns: wider intervals")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    return made


def percentage(text: str) -> float:
    """``5%`` as 0.05.

    Raises:
        argparse.ArgumentTypeError: it is none, or below 0.
    """
    try:
        share = float(text.removesuffix("%")) / 100.0
    except ValueError:
        share = math.nan
    if not 0.0 <= share < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no percentage of 0% or more; give one such as 5%")
    return share


def checked(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Mapping[str, int]]:
    """The options, and how many pairs and turns there are."""
    made = options()
    given = made.parse_args(arguments)
    sizes = dict(QUICK if given.quick else FULL)
    if given.pairs is not None:
        sizes["pairs"] = given.pairs
    if sizes["pairs"] < LEAST_PAIRS:
        made.error(f"--pairs: {given.pairs} are too few for an interval; give at least {LEAST_PAIRS}")
    if given.threads < 1:
        made.error(f"--threads: {given.threads} was given; it must be at least 1")
    return given, sizes


def main(arguments: Sequence[str] | None = None) -> int:
    given, sizes = checked(arguments)
    try:
        commit = resolve(given.tree, given.against)
        with files_of(given.tree, commit) as old:
            trees = {OLD: old, NEW: given.tree.resolve()}
            comparison = Comparison(trees, given.threads, sizes["turns"])
            rows = compare(comparison, given.rows, sizes["pairs"])
    except CheckoutError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted; the temporary files are removed", file=sys.stderr)
        return INTERRUPTED
    header = [
        "row",
        "seconds",
        "processor, new / old",
        "clock, new / old",
        f"verdict (error: over {given.threshold:.0%})",
    ]
    show(f"The working tree against {given.against} ({commit[:10]})", header, shown(rows, given.threshold))
    kept = {"quick": given.quick, "environment": environment(), "against": commit, "threshold": given.threshold}
    write_json(given.json, {**kept, "rows": record(rows, given.threshold)})
    return int(any(verdict(row, given.threshold)[1] for row in rows))


if __name__ == "__main__":
    # Ended by it, the process still removes its temporary files.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
