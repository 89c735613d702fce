"""The head not held fixed: the Schur complement in closed form, and the noise of the lower gradient."""

import math

import pytest
import torch
from torch import Tensor

from bilevel import CG, MINRES, Identity, Implicit, Params, Problem, hypergradient, linearize, proximal
from bilevel.linear import Dense, Solver

LAMBDA = 0.4


class TwoBlocks(Problem):
    """G = 1/2 y'My + lambda/2 |theta - x|^2 with y = (theta, phi); F = b'theta: H is M, v is (b, 0)."""

    regularization_weight = LAMBDA
    curvature_depends_on_upper = False

    def __init__(self, matrix: Tensor, b: Tensor) -> None:
        self.matrix, self.b = matrix, b

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        y = torch.cat([lower["theta"], lower["phi"]])
        return 0.5 * y @ self.matrix @ y + batch @ y

    def upper_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
        return self.b @ lower["theta"]

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return proximal(upper, lower, {"theta": "theta"})


def made() -> tuple[TwoBlocks, Params, Params]:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(9, 9, generator=generator, dtype=torch.float64)
    matrix = root @ root.T / 9 + 0.1 * torch.eye(9, dtype=torch.float64)
    problem = TwoBlocks(matrix, torch.randn(5, generator=generator, dtype=torch.float64))
    y = torch.randn(9, generator=generator, dtype=torch.float64)
    return problem, {"theta": y[:5] + 0.1}, {"theta": y[:5], "phi": y[5:]}


@pytest.mark.parametrize("solver", [Dense(), CG(100, 1e-12), MINRES(100, 1e-12)])
@pytest.mark.parametrize(("damping", "mu"), [(0.0, 0.0), (0.0, 0.3), (2.0, 1.0)])
def test_both_blocks_implicit_equals_the_schur_complement(solver: Solver, damping: float, mu: float) -> None:
    problem, upper, lower = made()
    found = hypergradient(
        problem,
        upper,
        lower,
        Implicit(solver, damping=damping, tikhonov={"phi": mu}, implicit=["theta", "phi"]),
        upper_batch=None,
        lower_batches=[torch.zeros(9, dtype=torch.float64)],
    )
    c = LAMBDA + damping
    tt, tp, pp = problem.matrix[:5, :5], problem.matrix[:5, 5:], problem.matrix[5:, 5:]
    # The system is divided by c, so that mu on the head's block is mu * c in the undivided one.
    schur = tt - tp @ torch.linalg.solve(pp + mu * c * torch.eye(4, dtype=torch.float64), tp.T)
    expected = torch.linalg.solve(torch.eye(5, dtype=torch.float64) + schur / c, problem.b)
    assert torch.allclose(found.grad["theta"], expected, rtol=1e-8)


def test_a_growing_tikhonov_on_the_head_gives_the_paper_back() -> None:
    problem, upper, lower = made()
    batches, both = [torch.zeros(9, dtype=torch.float64)], ["theta", "phi"]
    fixed, free, held = (
        hypergradient(problem, upper, lower, method, upper_batch=None, lower_batches=batches).grad["theta"]
        for method in (
            Implicit(Dense(), implicit=["theta"]),
            Implicit(Dense(), implicit=both),
            Implicit(Dense(), implicit=both, tikhonov={"phi": 1e6}),
        )
    )
    assert torch.allclose(held, fixed, rtol=1e-4)
    assert not torch.allclose(free, fixed, rtol=1e-2)


def test_noise_is_the_standard_error_over_batches() -> None:
    problem, upper, lower = made()
    generator = torch.Generator().manual_seed(5)
    batches = [torch.randn(9, generator=generator, dtype=torch.float64) for _ in range(4)]
    system = linearize(problem, upper, lower, batches, solver=Identity(), implicit=["theta", "phi"])
    stacked = torch.stack(batches)
    expected = math.sqrt(float(stacked.var(dim=0, correction=1).sum()) / 4)
    assert system.gradient_noise() == pytest.approx(expected, rel=1e-12)
    assert linearize(problem, upper, lower, batches[:1], implicit=["theta"]).gradient_noise() is None
    result = system.hypergradient(None)
    assert result.noise == pytest.approx(expected, rel=1e-12)
