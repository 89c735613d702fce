"""Processor time to a given F(x, y*(x)): this package's methods against TorchOpt and Betty on two problems.

    pip install -e ".[bench]"
    pip install "pip<24.1" && pip install --no-deps betty-ml
    python benchmarks/race/run.py --json benchmarks/results/race.json \
        --docs docs/peers.md --figure docs/_static/race.svg
    python benchmarks/race/run.py --from benchmarks/results/race.json --docs docs/peers.md --check

With ``--only "stochastic quadratic"`` that problem alone is measured; the others of the JSON file stay as they are.

Every method tries the same small grid of step sizes once for a fixed time; its best one is then run again with other
seeds, in turn with the others. The clock runs during a method's own steps; x is kept at marks on it, and F(x, y*(x)) is
found afterwards with y* solved exactly. A package that is missing or fails is a row that says so.
"""

import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from benchmarks import measuring, pages
from benchmarks.peers.adapters import installed
from benchmarks.race import figure as race_figure
from benchmarks.race.methods import ENTRIES, Entry
from benchmarks.race.problems import Race, Rates, hyper_cleaning, stochastic_quadratic

SECONDS, MARKS, REPEATS = 4.0, 12, 3
QUICK_SECONDS = 0.15
PROBLEMS = ("hyper-cleaning", "stochastic quadratic")
SHARES = (0.9, 0.99)
"""Targets: this share of the way from F at the start down to the lowest F that any method reached."""

Figures = dict[str, Any]


def run(race: Race, entry: Entry, rates: Rates, seconds: float, seed: int) -> Figures:
    """One run: times, F there, and why it ended early if it did."""
    torch.manual_seed(seed)
    marks = [seconds * 50.0 ** (k / (MARKS - 1) - 1.0) for k in range(MARKS)]
    clock, kept, failure = 0.0, [(0.0, race.upper)], None
    try:
        contestant = entry.start(race, rates, torch.Generator().manual_seed(seed))
        while clock < seconds:
            start = time.process_time()
            contestant.advance()
            clock += time.process_time() - start
            if not contestant.upper.isfinite().all():
                failure = "non-finite"
                break
            if clock >= marks[0]:
                kept.append((clock, contestant.upper.detach().clone()))
                marks = [mark for mark in marks if mark > clock] or [math.inf]
    except Exception as error:
        failure = f"{type(error).__name__}: {error}".splitlines()[0]
    values = [race.value(x) for _, x in kept]
    return {"times": [t for t, _ in kept], "values": values, "failure": failure}


def time_to(curve: Figures, target: float) -> float | None:
    """The first kept time at which F is at the target or below."""
    reached = (t for t, value in zip(curve["times"], curve["values"], strict=True) if value <= target)
    return next(reached, None)


def best_of(tries: Sequence[Figures], target: float) -> Figures:
    """The soonest at the target; among those that miss it, the lowest at the end."""

    def order(row: Figures) -> tuple[float, float]:
        found = time_to(row["curve"], target)
        return (math.inf if found is None else found, row["curve"]["values"][-1])

    return min(tries, key=order)


def targets(start: float, lowest: float) -> list[float]:
    return [start - share * (start - lowest) for share in SHARES]


def measure_race(race: Race, entries: Sequence[Entry], *, quick: bool) -> Figures:
    seconds, repeats = (QUICK_SECONDS, 1) if quick else (SECONDS, REPEATS)
    grid = race.grid[-1:] if quick else race.grid
    tries: dict[str, list[Figures]] = {entry.name: [] for entry in entries}
    for rates in grid:
        for entry in entries:
            curve = run(race, entry, rates, seconds, seed=0)
            tries[entry.name].append({"lower": rates.lower, "upper": rates.upper, "curve": curve})
    start = race.value(race.upper)
    lowest = min(min(row["curve"]["values"]) for rows in tries.values() for row in rows)
    chosen = {name: best_of(rows, targets(start, lowest)[0]) for name, rows in tries.items()}
    curves: dict[str, list[Figures]] = {entry.name: [] for entry in entries}
    for seed in range(1, repeats + 1):
        for entry in entries:
            rates = Rates(chosen[entry.name]["lower"], chosen[entry.name]["upper"])
            curves[entry.name].append(run(race, entry, rates, seconds, seed))
    lowest = min(lowest, *(min(curve["values"]) for several in curves.values() for curve in several))
    rows = [
        {"method": name, "lower": chosen[name]["lower"], "upper": chosen[name]["upper"], "curves": curves[name]}
        for name in tries
    ]
    return {
        "race": race.name,
        "environment": measuring.environment(),
        "seconds": seconds,
        "start": start,
        "lowest": lowest,
        "tried": len(grid),
        "rows": rows,
    }


def measure(*, quick: bool, only: str | None = None) -> Figures:
    entries = [entry for entry in ENTRIES if installed(entry.distribution) is not None]
    races = (hyper_cleaning(points=200 if quick else 800), stochastic_quadratic())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measured = [measure_race(race, entries, quick=quick) for race in races if only in (None, race.name)]
    return {
        "quick": quick,
        "methods": [{"name": entry.name, "version": installed(entry.distribution)} for entry in ENTRIES],
        "shares": SHARES,
        "races": measured,
    }


def joined(kept: Figures, new: Figures) -> Figures:
    """The new figures with those kept of problems that were not measured again."""
    measured = {race["race"]: race for race in new["races"]}
    return {**new, "races": [measured.get(race["race"], race) for race in kept["races"]]}


def _times(row: Figures, target: float) -> str:
    """Median, with the smallest and largest where there are several; how many runs got there where not all did."""
    found = [t for t in (time_to(curve, target) for curve in row["curves"]) if t is not None]
    if not found:
        return "not reached"
    text = f"{statistics.median(found):.2f}"
    if len(found) > 1:
        text += f" ({min(found):.2f} to {max(found):.2f})"
    missed = len(row["curves"]) - len(found)
    return f"{text}, {len(found)} of {len(row['curves'])} runs" if missed else text


def race_table(race: Figures, methods: Sequence[Figures]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for row in race["rows"]:
        failures = [curve["failure"] for curve in row["curves"] if curve["failure"]]
        final = statistics.median(curve["values"][-1] for curve in row["curves"])
        times = [_times(row, target) for target in targets(race["start"], race["lowest"])]
        ended = f"{final:.4g}" + (f" ({failures[0].split(':')[0]})" if failures else "")
        rows.append([row["method"], *times, ended, f"{row['lower']:g}, {row['upper']:g}"])
    rows += [[m["name"], "not installed", "", "", ""] for m in methods if m["version"] is None]
    shares = [f"seconds to {share:.0%} of the way" for share in SHARES]
    return ["", *shares, f"F after {race['seconds']:g} s", "step sizes (lower, upper)"], rows


def tables(figures: Figures) -> dict[str, str]:
    """Every text of the page by the name in its markers."""
    texts = {}
    for race in figures["races"]:
        setting = (
            f"Every method tried {race['tried']} pair{'s' if race['tried'] != 1 else ''} of step sizes once for "
            f"{race['seconds']:g} s and ran {len(race['rows'][0]['curves'])} times more with its best."
        )
        conditions = pages.conditions({**race, "quick": figures["quick"]})
        table = pages.table(*race_table(race, figures["methods"]))
        texts[f"race-{race['race'].replace(' ', '-')}"] = f"{conditions} {setting}\n\n{table}"
    return texts


def main(arguments: list[str] | None = None) -> int:
    parser = measuring.parser(__doc__)
    parser.add_argument("--from", type=Path, dest="source", help="take figures from this file instead of measuring")
    parser.add_argument("--docs", type=Path, help="put the tables between the markers of this page")
    parser.add_argument("--figure", type=Path, help="draw the curves here (SVG)")
    parser.add_argument("--only", choices=PROBLEMS, help="measure this problem alone")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the page differs")
    options = parser.parse_args(arguments)
    if options.check and not options.docs:
        parser.error("--check needs --docs")
    if options.only and options.source:
        parser.error("--only measures a problem, and --from takes kept figures; leave one of them out")
    if options.device.type != "cpu":
        parser.error("the race is run on the CPU: its problems are too small for an accelerator")
    measuring.use_threads(options.threads)
    kept: Path | None = options.source
    figures = json.loads(kept.read_text(encoding="utf-8")) if kept else measure(quick=options.quick, only=options.only)
    target: Path | None = options.json
    if options.only and target and target.exists():
        figures = joined(json.loads(target.read_text(encoding="utf-8")), figures)
    measuring.write_json(options.json, figures)
    if options.figure and not options.check:
        race_figure.draw(figures, options.figure)
    if options.docs:
        return pages.update(options.docs, tables(figures), check=options.check)
    for race in figures["races"]:
        measuring.show(race["race"], *race_table(race, figures["methods"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
