"""How long commands take to start, in multiples of ``import torch``.

    python benchmarks/guard/startup.py --json benchmarks/results/startup.json --docs docs/cost.md

Every repeat starts each command once in a process of its own, in turn, in another order each time; a figure is the
command's over that of ``import torch`` in the same repeat. A round before, which does not count, fills the caches of
files and of bytecode.
"""

import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.guard.commands import COMMANDS, IMPORT_TORCH, Seconds, run_timed
from benchmarks.measuring import Timing, environment, parser, show, use_threads, write_json
from benchmarks.pages import conditions, table, update

ROOT = Path(__file__).resolve().parents[2]
TORCH = "import torch"
CLOCKS = {"processor": "of the processor", "clock": "of the clock"}


def measure(repeats: int, threads: int) -> dict[str, dict[str, Any]]:
    """Seconds of ``import torch`` and multiples of it, by command: median and quartiles over the repeats."""
    every = {TORCH: IMPORT_TORCH, **COMMANDS}
    taken: dict[str, list[Seconds]] = {name: [] for name in every}
    order, draw = list(every), random.Random(0)
    for repeat in range(-1, repeats):
        print(f"repeat {repeat + 1} of {repeats}", file=sys.stderr, flush=True)
        draw.shuffle(order)
        for name in order:
            seconds = run_timed(every[name], ROOT, threads)
            if repeat >= 0:
                taken[name].append(seconds)
    timings = {
        name: {clock: Timing(tuple(getattr(each, clock) for each in seconds)) for clock in CLOCKS}
        for name, seconds in taken.items()
    }
    ratios = {
        name: {clock: timing.over(timings[TORCH][clock]).record() for clock, timing in row.items()}
        for name, row in timings.items()
        if name != TORCH
    }
    return {"seconds": {clock: timings[TORCH][clock].record() for clock in CLOCKS}, "ratios": ratios}


def rows(figures: Mapping[str, Any]) -> list[list[str]]:
    """``import torch`` in seconds, the others in multiples of it."""

    def spread(row: Mapping[str, float]) -> str:
        return f"{row['median']:.2f} ({row['q1']:.2f} to {row['q3']:.2f})"

    torch_row = [f"`{TORCH}`", *(f"{figures['seconds'][clock]['median']:.2f} s" for clock in CLOCKS)]
    others = figures["ratios"].items()
    return [torch_row, *([f"`{name}`", *(spread(row[clock]) for clock in CLOCKS)] for name, row in others)]


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """The table of the page."""
    return {"start-up": f"{table(['start', *CLOCKS.values()], rows(figures))}\n\n{conditions(figures)}"}


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=15, help="starts of each command (default: 15)")
    options.add_argument("--docs", type=Path, help="write the table into this page")
    options.add_argument("--from", type=Path, dest="source", help="take figures from this file instead of measuring")
    given = options.parse_args(arguments)
    if given.device.type != "cpu" or given.repeats < 1:
        options.error("--device: starts are measured on the CPU, leave it out; --repeats must be at least 1")
    if given.source is None:
        threads, repeats = given.threads or 1, 2 if given.quick else given.repeats
        use_threads(threads)
        measured = measure(repeats, threads)
        figures = {"quick": given.quick, "environment": environment(), "repeats": repeats, **measured}
        write_json(given.json, figures)
    else:
        figures = json.loads(given.source.read_text(encoding="utf-8"))
    show("Start-up, in multiples of import torch", ["start", *CLOCKS.values()], rows(figures))
    return 0 if given.docs is None else update(given.docs, tables(figures), check=False)


if __name__ == "__main__":
    sys.exit(main())
