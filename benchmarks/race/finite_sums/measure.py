"""Runs of the finite sums: one clock, oracle calls and iterations on the way of F(x, y*(x)) to its lowest value."""

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from benchmarks.race.finite_sums.contestants import Contestant, Entry
from benchmarks.race.finite_sums.problems import FiniteSum, Steps

SEEDS = (1, 2, 3)
TRY_SHARE = 0.25
"""Every pair of steps is tried for this share of the budget."""
SHARES = (0.9, 0.99, 0.999)
"""Targets: this share of the way from F at the start down to its lowest value. A run ends at the last one."""
GROWTH = 1.1
"""F is found after 1, 2, 3, ... chunks, farther apart by this factor once they are many."""

Figures = dict[str, Any]


class Watch:
    """The look of a timed run: the clock of processor time, which stands while x is looked at, and the curve.

    Args:
        targets: values of F, from high to low.
        budget: oracle calls.
    """

    def __init__(self, problem: FiniteSum, contestant: Contestant, targets: Sequence[float], budget: int) -> None:
        self.problem, self.contestant, self.targets, self.budget = problem, contestant, targets, budget
        self.seconds, self.chunks, self.following = 0.0, -1, 1
        self.curve: Figures = {"iterations": [], "seconds": [], "oracles": [], "values": []}
        self.resumed = time.process_time()

    def __call__(self, x: Tensor) -> bool:
        now = time.process_time()
        self.chunks += 1
        if self.chunks:
            self.seconds += now - self.resumed
        goes_on = self._keep(x)
        self.resumed = time.process_time()
        return goes_on

    def _keep(self, x: Tensor) -> bool:
        oracles = self.contestant.oracles(self.chunks)
        goes_on = oracles < self.budget
        if self.chunks and self.chunks < self.following and goes_on:
            return True
        self.following = max(self.chunks + 1, int(self.chunks * GROWTH))
        value = self.problem.reduced.value(x) if bool(x.isfinite().all()) else math.inf
        if not math.isfinite(value):
            self.curve["failure"] = "not finite"
            return False
        kept = (
            self.chunks * self.contestant.chunk,
            float(f"{self.seconds:.4g}"),
            round(oracles),
            float(f"{value:.7g}"),
        )
        for name, number in zip(("iterations", "seconds", "oracles", "values"), kept, strict=True):
            self.curve[name].append(number)
        return goes_on and value > self.targets[-1]


def run(
    problem: FiniteSum, contestant: Contestant, steps: Steps, seed: int, targets: Sequence[float], budget: int
) -> Figures:
    """The curve of one run, with a `failure` where it ended by one."""
    watch = Watch(problem, contestant, targets, budget)
    try:
        contestant.run(steps, seed, watch)
    except Exception as error:
        watch.curve["failure"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return watch.curve


def reached(curve: Figures, target: float) -> int | None:
    """The first place of the curve where F is at the target or below."""
    return next((place for place, value in enumerate(curve["values"]) if value <= target), None)


def best_of(tries: Sequence[Figures], targets: Sequence[float]) -> Figures:
    """The most targets reached, the last of them after the fewest oracle calls; then the lowest at the end."""

    def order(row: Figures) -> tuple[float, float, float]:
        curve = row["curve"]
        places = [place for place in (reached(curve, target) for target in targets) if place is not None]
        spent = curve["oracles"][places[-1]] if places else math.inf
        failed = "failure" in curve or not curve["values"]
        return (-len(places), spent, math.inf if failed else curve["values"][-1])

    return min(tries, key=order)


def measure_problem(problem: FiniteSum, entries: Sequence[Entry], *, quick: bool) -> Figures:
    """Every entry tries the grid with one seed and runs with its best pair and others, all in turn."""
    start, lowest = problem.reduced.value(problem.upper), problem.reduced.lowest()
    targets = [start - share * (start - lowest) for share in SHARES]
    taking_part, failures = _prepared(problem, entries)
    tries: dict[str, list[Figures]] = {title: [] for title in taking_part}
    for steps in problem.grid[:1] if quick else problem.grid:
        for title, contestant in taking_part.items():
            curve = run(problem, contestant, steps, 0, targets, round(TRY_SHARE * problem.budget))
            tries[title].append({"size": steps.size, "ratio": steps.ratio, "curve": curve})
    chosen = {title: best_of(rows, targets) for title, rows in tries.items()}
    curves: dict[str, list[Figures]] = {title: [] for title in taking_part}
    for seed in SEEDS[:1] if quick else SEEDS:
        for title, contestant in taking_part.items():
            steps = Steps(chosen[title]["size"], chosen[title]["ratio"])
            curves[title].append(run(problem, contestant, steps, seed, targets, problem.budget))
    rows = [
        {"method": title, "size": best["size"], "ratio": best["ratio"], "curves": curves[title]}
        for title, best in chosen.items()
    ]
    grid = {"tried": len(problem.grid), "budget": problem.budget, "failures": failures}
    return {"problem": problem.name, "start": start, "lowest": lowest, **grid, "rows": rows}


def _prepared(problem: FiniteSum, entries: Sequence[Entry]) -> tuple[dict[str, Contestant], Mapping[str, str]]:
    """Contestants by title, and why others are none."""
    taking_part, failures = {}, {}
    for entry in entries:
        if entry.only and entry.only != problem.name:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                taking_part[entry.title] = entry.prepare(problem)
        except Exception as error:
            failures[entry.title] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return taking_part, failures
