"""Every solver on systems of different kinds whose exact solutions are known: quadratic ones and a network's."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.solvers.network import Setting, Spectra
from benchmarks.solvers.systems import with_spectrum
from bilevel import Params, Problem, linearize
from bilevel.compare import (
    Family,
    KnownSystem,
    lower_gradient,
    measure_curves,
    measure_successive,
    standard_solvers,
    stopping_solvers,
)
from bilevel.hypergradients import System
from bilevel.linear import CG, Solver
from bilevel.products import HVPProvider, ReverseOverReverse

SIZE = 500
COUNT = 3
BUDGETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 80)
BISSL_BUDGETS = (1, 2, 4, 6, 8, 12)
TOLERANCES = (1e-2, 1e-6)
COLUMNS = (("first", TOLERANCES[0]), ("first", TOLERANCES[1]), ("later", TOLERANCES[1]))
BISSL = "BiSSL-shaped, c = 10"
LATER = ("ill-conditioned (1e6)", "BiSSL-shaped")
"""Systems of which the picture has a row for later right-hand sides too."""

GRAPHS = ReverseOverReverse(keep_graph=True)


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


def matrices(*, quick: bool, device: torch.device) -> list[KnownSystem]:
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
        found.append(known_system(name, Quadratic(matrix), {}, zero, [None], named, list(exact), budgets))
    return found


def network(setting: Setting, hessians: Spectra, *, quick: bool) -> KnownSystem:
    """I + H/10 of the contrastive network."""
    rights = setting.right_hand_sides()[: 2 if quick else None]
    exact, noise = hessians.solutions(10.0, rights)
    budgets = (1, 2) if quick else BISSL_BUDGETS
    problem, y = setting.problem(10.0), setting.lower
    return known_system(BISSL, problem, y, y, setting.batches, rights, exact, budgets, noise=noise)


def known_system(
    name: str,
    problem: Problem,
    upper: Params,
    lower: Params,
    batches: Sequence[Any],
    rights: Sequence[Params],
    exact: Sequence[Tensor],
    budgets: Sequence[int],
    noise: float | None = None,
) -> KnownSystem:
    def system(solver: Solver, hvp: HVPProvider | None) -> System:
        return linearize(problem, upper, lower, batches, solver=solver, hvp=GRAPHS if hvp is None else hvp)

    def gradient() -> None:
        for batch in batches:
            lower_gradient(problem, upper, lower, batch)

    return KnownSystem(name, system, gradient, rights, exact, budgets, noise)


def families(system: KnownSystem) -> dict[str, Family]:
    """The standard solvers; A is known to contain the identity where it is the network's."""
    return standard_solvers(1.0 if system.name == BISSL else None)


def measure_system(system: KnownSystem, count: int) -> list[dict[str, Any]]:
    """The curves of all solvers for the first `count` right-hand sides."""
    few = replace(system, rights=system.rights[:count], exact=system.exact[:count])
    return measure_curves(few, families(few), few.unit())[0]


def successive_solvers() -> dict[str, tuple[Solver, HVPProvider | None]]:
    """Those with stopping rules, and the published procedure with its graphs rebuilt for every product."""
    rebuilt = (CG(5, None, layerwise=True), ReverseOverReverse())
    return {
        "layer-wise CG, 5 iterations, graphs rebuilt": rebuilt,
        **{name: (solver, None) for name, solver in stopping_solvers(1.0).items()},
    }


def measure(setting: Setting, hessians: Spectra, *, quick: bool, device: torch.device) -> dict[str, Any]:
    bissl = network(setting, hessians, quick=quick)
    systems = [*matrices(quick=quick, device=device), bissl]
    count = 2 if quick else COUNT
    return {
        "noise": bissl.noise,
        "curves": [row for system in systems for row in measure_system(system, count)],
        "successive": measure_successive(bissl, successive_solvers(), 1 if quick else 3)[0],
    }
