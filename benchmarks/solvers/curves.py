"""Error against products and against time: every solver on systems of different kinds, with the budget growing.

Each system meets several right-hand sides twice: as the first one of a fresh state, and as a later one whose state has
answered another already. Times are multiples of one gradient of the lower objective over the same batches, taken in the
same round; the first right-hand side pays for its linearization.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import Timing, interleaved, synchronize
from benchmarks.solvers.network import Setting, Spectra, gradient, joined, relative
from benchmarks.solvers.systems import with_spectrum
from bilevel import CG, MINRES, Identity, Neumann, Nystrom, Params, Problem, linearize
from bilevel.hypergradients import System
from bilevel.linear import Dense, Diagonal, Escalating, NystromPreconditioner, Solver
from bilevel.products import HVPProvider, ReverseOverReverse

SIZE = 500
RANK = 30
COUNT = 3
BUDGETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 80)
BISSL_BUDGETS = (1, 2, 4, 6, 8, 12)
EXACT_ENOUGH = 1e-9
TOLERANCES = (1e-2, 1e-6)
BISSL = "BiSSL-shaped, c = 10"


@dataclass(frozen=True)
class Bench:
    """One system with its right-hand sides and exact solutions.

    Attributes:
        tikhonov: what is known about A beforehand, the damping of a Nystrom model; None where nothing is.
        noise: distance of the exact solutions from those of other batches; None where there are no batches.
    """

    name: str
    problem: Problem
    lower: Params
    batches: Sequence[Any]
    rights: Sequence[Params]
    exact: Sequence[Tensor]
    budgets: Sequence[int]
    tikhonov: float | None = None
    noise: float | None = None

    def linearize(self, solver: Solver, hvp: HVPProvider | None = None) -> System:
        upper = self.lower if self.problem.regularization_weight else {}
        provider = ReverseOverReverse(keep_graph=True) if hvp is None else hvp
        return linearize(self.problem, upper, self.lower, self.batches, solver=solver, hvp=provider)

    def gradient(self) -> None:
        for batch in self.batches:
            gradient(self.problem, self.lower, batch)


def methods(budget: int, tikhonov: float | None) -> dict[str, Solver]:
    """Every solver with this many iterations; those that take none are the same for every budget."""
    return {
        "CG": CG(budget, None),
        "CG, recycled": CG(budget, None, recycle=64),
        "CG, diagonal": CG(budget, None, preconditioner=Diagonal()),
        "CG, Nyström": CG(budget, None, preconditioner=NystromPreconditioner(RANK, tikhonov=tikhonov)),
        "MINRES": MINRES(budget, None),
        "Escalating(CG)": Escalating(CG(budget, None)),
        "layer-wise CG": CG(budget, None, layerwise=True),
        "Neumann": Neumann(budget),
        "Nyström": Nystrom(RANK, tikhonov=tikhonov, max_refinements=budget, rtol=None),
        "Dense": Dense(),
        "Identity": Identity(),
    }


class Quadratic(Problem):
    """L = 1/2 y'Ay over four leaves; no regularizer."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        y = torch.cat([leaf.reshape(-1) for leaf in lower.values()])
        return 0.5 * y @ (self.matrix @ y)

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return lower["0"].sum()


def spectra(n: int) -> dict[str, Tensor]:
    """Eigenvalues of the small systems, by name."""

    def evenly(low: float, high: float, count: int) -> Tensor:
        return torch.linspace(low, high, count, dtype=torch.float64)

    outliers, few = n // 40, n // 10
    return {
        "well-conditioned (10)": evenly(0.4, 4.0, n),
        "ill-conditioned (1e2), evenly spread": torch.logspace(-2, 0, n, dtype=torch.float64),
        f"ill-conditioned (1e6), {outliers} large eigenvalues": torch.cat(
            [evenly(1.0, 2.0, n - outliers), torch.logspace(1, 6, outliers, dtype=torch.float64)]
        ),
        "indefinite": torch.cat([evenly(-1.0, -0.2, outliers), evenly(0.3, 4.0, n - outliers)]),
        "singular, consistent": torch.cat([torch.zeros(few, dtype=torch.float64), evenly(0.5, 4.0, n - few)]),
    }


def matrices(*, quick: bool, device: torch.device) -> list[Bench]:
    n, count = (40, 2) if quick else (SIZE, COUNT)
    found = []
    for name, values in spectra(n).items():
        matrix = with_spectrum(values).to(device)
        drawn = torch.randn(count, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
        rights = drawn if values.abs().min() > 0.0 else drawn @ matrix
        exact = rights @ torch.linalg.pinv(matrix, hermitian=True, rtol=1e-12)
        named = [{f"{k}": part for k, part in enumerate(b.chunk(4))} for b in rights]
        zero = {name: torch.zeros_like(part) for name, part in named[0].items()}
        budgets = (1, 4) if quick else BUDGETS
        found.append(Bench(name, Quadratic(matrix), zero, [None], named, list(exact), budgets))
    return found


def network(setting: Setting, hessians: Spectra, *, quick: bool) -> Bench:
    """I + H/10 of the contrastive network."""
    rights = setting.right_hand_sides()[: 2 if quick else None]
    exact, noise = hessians.solutions(10.0, rights)
    budgets = (1, 2) if quick else BISSL_BUDGETS
    problem, lower = setting.problem(10.0), setting.lower
    return Bench(BISSL, problem, lower, setting.batches, rights, exact, budgets, tikhonov=1.0, noise=noise)


@dataclass
class _Point:
    """What one method did with one budget, over the right-hand sides."""

    errors: list[float]
    products: list[int]
    seconds: list[float]
    statuses: set[str]

    def record(self, budget: int, unit: float) -> dict[str, Any]:
        return {
            "budget": budget,
            "error": Timing(tuple(self.errors)).record(),
            "errors": self.errors,
            "products": self.products,
            "gradients": [value / unit for value in self.seconds],
            "status": self.statuses.pop() if len(self.statuses) == 1 else "MIXED",
        }


def measure_bench(bench: Bench, count: int) -> list[dict[str, Any]]:
    """The curves of all methods, first and later right-hand sides; a method that is exact enough goes no further."""
    unit = interleaved({"gradient": bench.gradient}, 31)["gradient"].median
    rows: list[dict[str, Any]] = []
    for name, smallest in methods(1, bench.tikhonov).items():
        if name != "Dense":
            bench.linearize(smallest).solve(bench.rights[0])
        curves: dict[str, list[dict[str, Any]]] = {"first": [], "later": []}
        for budget in bench.budgets:
            # One product for each variable is timed once.
            points = _solve_all(bench, methods(budget, bench.tikhonov)[name], count, 1 if name == "Dense" else count)
            for use, point in points.items():
                curves[use].append(point.record(budget, unit))
            done = all(max(point.errors) <= EXACT_ENOUGH for point in points.values())
            if done or name in ("Dense", "Identity"):
                break
        rows += [{"system": bench.name, "solver": name, "use": use, "points": curves[use]} for use in curves]
    return rows


def _solve_all(bench: Bench, solver: Solver, count: int, states: int) -> dict[str, _Point]:
    """Solutions of the first `states` right-hand sides with fresh states, and of all but one with the first state."""
    points = {use: _Point([], [], [], set()) for use in ("first", "later")}
    kept = None
    for index in range(count):
        if index < states:
            start = _now()
            fresh = bench.linearize(solver)
            solution = fresh.solve(bench.rights[index])
            _add(points["first"], bench, index, solution, _now() - start)
            kept = fresh if kept is None else kept
        if index and kept is not None:
            start = _now()
            solution = kept.solve(bench.rights[index])
            _add(points["later"], bench, index, solution, _now() - start)
    return points


def _now() -> float:
    synchronize()
    return time.perf_counter()


def _add(point: _Point, bench: Bench, index: int, solution: Any, seconds: float) -> None:
    point.errors.append(relative(joined(solution.value), bench.exact[index]))
    point.products.append(solution.num_hvps)
    point.seconds.append(seconds)
    point.statuses.add(solution.status.name)


def to_tolerance(row: Mapping[str, Any], tolerance: float) -> dict[str, Timing] | None:
    """Products and gradients until the error is below the tolerance, one sample a right-hand side; None where one of
    them never gets there."""
    products, gradients = [], []
    for index in range(len(row["points"][0]["errors"])):
        reached = [point for point in row["points"] if point["errors"][index] <= tolerance]
        if not reached:
            return None
        products.append(reached[0]["products"][index])
        gradients.append(reached[0]["gradients"][index])
    return {"products": Timing(tuple(products)), "gradients": Timing(tuple(gradients))}


SUCCESSIVE: dict[str, tuple[Solver, HVPProvider]] = {
    "layer-wise CG, 5 iterations, graphs rebuilt": (CG(5, None, layerwise=True), ReverseOverReverse()),
    "layer-wise CG, 5 iterations": (CG(5, None, layerwise=True), ReverseOverReverse(keep_graph=True)),
    "CG, 5 iterations": (CG(5, None), ReverseOverReverse(keep_graph=True)),
    "CG, 2 iterations": (CG(2, None), ReverseOverReverse(keep_graph=True)),
    "CG to 1e-2": (CG(50, 1e-2), ReverseOverReverse(keep_graph=True)),
    "CG recycled, to 1e-2": (CG(50, 1e-2, recycle=40), ReverseOverReverse(keep_graph=True)),
    "CG to the noise": (CG(50, "noise"), ReverseOverReverse(keep_graph=True)),
    "CG recycled, to the noise": (CG(50, "noise", recycle=40), ReverseOverReverse(keep_graph=True)),
    "CG, Nyström, to 1e-2": (
        CG(50, 1e-2, preconditioner=NystromPreconditioner(RANK, tikhonov=1.0)),
        ReverseOverReverse(keep_graph=True),
    ),
    "MINRES to 1e-2": (MINRES(50, 1e-2), ReverseOverReverse(keep_graph=True)),
    "Neumann to 1e-2": (Neumann(50, 1e-2), ReverseOverReverse(keep_graph=True)),
    "Nyström to 1e-2": (
        Nystrom(RANK, tikhonov=1.0, max_refinements=50, rtol=1e-2),
        ReverseOverReverse(keep_graph=True),
    ),
    "Identity": (Identity(), ReverseOverReverse()),
}


def measure_successive(bench: Bench, repeats: int) -> list[dict[str, Any]]:
    """All right-hand sides one after the other through one state: what the upper steps of an alternation pay."""

    def solve_all(solver: Solver, hvp: HVPProvider) -> list[Any]:
        system = bench.linearize(solver, hvp)
        return [system.solve(b) for b in bench.rights]

    found: dict[str, list[Any]] = {}

    def record(name: str) -> None:
        found[name] = solve_all(*SUCCESSIVE[name])

    functions: dict[str, Callable[[], object]] = {"gradient": bench.gradient}
    functions |= {name: lambda name=name: record(name) for name in SUCCESSIVE}
    # The gradient is short enough to be slow at its first call, which is made here.
    bench.gradient()
    seconds = interleaved(functions, repeats, warm_up=0)
    rows = []
    for name, solutions in found.items():
        errors = [relative(joined(s.value), x) for s, x in zip(solutions, bench.exact, strict=True)]
        rows.append(
            {
                "solver": name,
                "products": [s.num_hvps for s in solutions],
                "error": statistics.median(errors),
                "worst": max(errors),
                "gradients": seconds[name].over(seconds["gradient"]).record(),
                "statuses": sorted({s.status.name for s in solutions}),
            }
        )
    return rows


def measure(setting: Setting, hessians: Spectra, *, quick: bool, device: torch.device) -> dict[str, Any]:
    bissl = network(setting, hessians, quick=quick)
    benches = [*matrices(quick=quick, device=device), bissl]
    count = 2 if quick else COUNT
    return {
        "noise": bissl.noise,
        "curves": [row for bench in benches for row in measure_bench(bench, count)],
        "successive": measure_successive(bissl, 1 if quick else 3),
    }
