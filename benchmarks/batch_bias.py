"""The mean hypergradient of mini-batch systems where the true one is zero.

    python benchmarks/batch_bias.py --threads 1 --json benchmarks/results/batch_bias.json

At the optimum of the race's quadratics, with x and y exact and the whole set above, the mean over draws of the lower
batch would be zero without bias. A figure is the norm of that mean over 60 draws of one batch, with the standard error
of the mean (over all entries together). The whole set shows what is left by the iterations alone.
"""

import sys
from pathlib import Path
from typing import Any

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from benchmarks.measuring import environment, parser, show, use_threads, write_json
from benchmarks.race.finite_sums.contestants import SumProblem
from benchmarks.race.finite_sums.problems import FiniteSum, quadratics
from benchmarks.race.finite_sums.reduced import ReducedQuadratic
from bilevel import CG, Params, hypergradient

SOLVERS = {
    "CG(1)": CG(1, None),
    "CG(5, 1e-2)": CG(5, 1e-2),
    "CG(10, 1e-2)": CG(10, 1e-2),
}
DRAWS = {64: 60, 256: 60, 1024: 1}
"""Rows of the batch -> draws; the last is the whole set."""


def optimum(problem: FiniteSum) -> tuple[Params, Params]:
    """x and y in float64."""
    assert isinstance(problem.reduced, ReducedQuadratic)
    x = -torch.linalg.solve(problem.reduced.hessian, problem.reduced.linear)
    A, _, C, a, _ = (part.double().mean(0) for part in problem.lower_data[1:])
    return {"x": x}, {"y": -torch.linalg.solve(A, C.T @ x + a)}


def in_float64(data: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(part.double() if part.is_floating_point() else part for part in data)


def bias(problem: FiniteSum, solver: CG, rows: int, draws: int) -> tuple[float, float]:
    """The norm of the mean over draws, and the root of the variance of that mean summed over its entries."""
    x, y = optimum(problem)
    below, above = in_float64(problem.lower_data), in_float64(problem.upper_data)
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(draws):
        index = torch.randperm(len(below[0]), generator=generator)[:rows]
        batches = [tuple(part[index] for part in below)]
        options: dict[str, Any] = {"upper_batch": above, "lower_batches": batches, "on_failure": "ignore"}
        found.append(hypergradient(SumProblem(problem), x, y, solver, **options).grad["x"])
    samples = torch.stack(found)
    error = (samples.var(0).sum() / draws).sqrt() if draws > 1 else torch.zeros(())
    return float(samples.mean(0).norm()), float(error)


def measure(*, quick: bool = False) -> dict[str, Any]:
    """The figures, by rows of the batch and solver."""
    problem, figures = quadratics(), {}
    for rows, draws in DRAWS.items():
        count = min(draws, 4) if quick else draws
        found = {name: bias(problem, solver, rows, count) for name, solver in SOLVERS.items()}
        figures[str(rows)] = {name: {"bias": norm, "error": error} for name, (norm, error) in found.items()}
    return {"quick": quick, "environment": environment(), "bias": figures}


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__).parse_args(arguments)
    use_threads(options.threads)
    figures = measure(quick=options.quick)
    write_json(options.json, figures)
    table = [
        [rows, *(f"{row[name]['bias']:.2g} +- {row[name]['error']:.1g}" for name in SOLVERS)]
        for rows, row in figures["bias"].items()
    ]
    show("Norm of the mean hypergradient, where the true one is 0", ["rows", *SOLVERS], table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
