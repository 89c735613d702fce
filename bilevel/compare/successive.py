"""Several right-hand sides one after the other through one state: what the upper steps of an alternation pay for."""

import statistics
from collections.abc import Mapping
from typing import Any

from bilevel import tree
from bilevel.compare.curves import KnownSystem
from bilevel.compare.measuring import Deadline, Timing, interleaved, now
from bilevel.compare.solvers import preparation
from bilevel.linear import Identity, Solution, Solver
from bilevel.products import HVPProvider

_TYPICAL = 10
"""Products a right-hand side that a solver with a stopping rule is expected to make."""


def measure_successive(
    known: KnownSystem,
    solvers: Mapping[str, tuple[Solver, HVPProvider | None]],
    repeats: int = 1,
    *,
    deadline: Deadline | None = None,
    pace: float = 0.0,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Products, errors and time of every solver, and in words what the time did not suffice for.

    Times are in gradients of the same repeat, in which all solvers are run once.

    Args:
        solvers: each with its provider, None for that of `known`.
        pace: seconds a product, by which a solver that would take too long is left out.
    """
    deadline = Deadline(None) if deadline is None else deadline
    found: dict[str, list[Solution]] = {}
    samples: dict[str, list[float]] = {name: [] for name in solvers}
    # The gradient is short enough to be slow at its first call, which is made here.
    known.gradient()
    for repeat in range(repeats):
        unit = interleaved({"gradient": known.gradient}, 1, warm_up=0)["gradient"].median
        for name, (solver, hvp) in solvers.items():
            if repeat == 0 and _expected(known, solver, pace) > deadline.left():
                continue
            if repeat and name not in found:
                continue
            start = now()
            system = known.linearize(solver, hvp)
            found[name] = [system.solve(b) for b in known.rights]
            samples[name].append((now() - start) / unit)
    rows = [_row(known, name, solutions, Timing(tuple(samples[name]))) for name, solutions in found.items()]
    left_out = [name for name in solvers if name not in found]
    return rows, [f"one after the other, without {', '.join(left_out)}"] if left_out else []


def _expected(known: KnownSystem, solver: Solver, pace: float) -> float:
    if isinstance(solver, Identity):
        return 0.0
    return pace * (preparation(solver, tree.size(known.rights[0])) + _TYPICAL * len(known.rights))


def _row(known: KnownSystem, name: str, solutions: list[Solution], time: Timing) -> dict[str, Any]:
    errors = [known.error(index, solution.value) for index, solution in enumerate(solutions)]
    return {
        "solver": name,
        "products": [solution.num_hvps for solution in solutions],
        "error": statistics.median(errors),
        "worst": max(errors),
        "gradients": time.record(),
        "statuses": sorted({solution.status.name for solution in solutions}),
    }
