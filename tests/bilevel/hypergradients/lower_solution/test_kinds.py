"""Lower solutions that are constrained, penalised, fixed points or roots, against finite differences and algebra."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import CG, Params, SolverWarning
from bilevel.hypergradients import lower_solution
from bilevel.linear import GMRES, AdjointIteration, Dense, Solver
from bilevel.lower import (
    L1,
    Box,
    FixedPointProblem,
    NonNegative,
    ProximalMap,
    ProximalProblem,
    RootProblem,
    Simplex,
)
from tests.support.cases import vector, with_spectrum
from tests.support.problems.closed_forms import NO_BATCH

SOLVERS: list[Solver] = [GMRES(50, rtol=1e-12), AdjointIteration(3000, rtol=1e-12), Dense()]
A = with_spectrum([0.5, 0.8, 1.0, 1.5, 2.0])
C = vector(10, 80).reshape(5, 2)


class Constrained(ProximalProblem):
    """y'Ay / 2 - (Cx)'y beside a set or a penalty whose parameter is the upper variable p."""

    step_size = 0.5

    def __init__(self, make: Callable[[Tensor], ProximalMap]) -> None:
        self.make = make

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        y = lower["y"]
        return 0.5 * y @ A @ y - (C @ upper["x"]) @ y

    def proximal_map(self, upper: Params) -> ProximalMap:
        return self.make(upper["p"])

    @torch.no_grad()
    def solution(self, x: Tensor, p: Tensor) -> Tensor:
        y = {"y": torch.zeros(5, dtype=torch.float64)}
        for _ in range(400):
            y = self.fixed_point_map({"x": x, "p": p}, y, None)
        return y["y"]


MAPS: dict[str, tuple[Callable[[Tensor], ProximalMap], float]] = {
    "box": (lambda p: Box(-0.1, p), 0.2),
    "non-negative": (lambda p: NonNegative(), 0.4),
    "simplex": (lambda p: Simplex(p), 1.3),
    "lasso": (lambda p: L1(p.exp()), -1.0),
}
"""Maps of p, and a p."""


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_gradcheck_on_constrained_lower_levels(name: str, solver: Solver) -> None:
    make, value = MAPS[name]
    problem = Constrained(make)

    def solved(x: Tensor, p: Tensor) -> Tensor:
        y = lower_solution(problem, {"x": x, "p": p}, {"y": problem.solution(x, p)}, NO_BATCH, solver)
        return y["y"]

    x, p = vector(2, 81).requires_grad_(), torch.tensor(value, dtype=torch.float64, requires_grad=True)
    # Some entries are on the boundary and some are not; differences stay on one side of every kink.
    z = problem.solution(x, p) - 0.5 * (A @ problem.solution(x, p) - C @ x.detach())
    distances = make(p.detach()).distances({"y": z}, 0.5)["y"]
    assert 0 < int((distances < 0.0).sum()) < distances.numel()
    assert float(distances.abs().min()) > 1e-2
    assert torch.autograd.gradcheck(solved, (x, p))


class Equilibrium(FixedPointProblem):
    """y = tanh(W y + U x + b), an equilibrium network's layer."""

    def fixed_point_map(self, upper: Params, lower: Params, batch: Any) -> Params:
        return {"y": torch.tanh(upper["W"] @ lower["y"] + batch @ upper["u"])}

    @torch.no_grad()
    def solution(self, W: Tensor, u: Tensor, batch: Tensor) -> Tensor:
        y = torch.zeros(5, dtype=torch.float64)
        for _ in range(400):
            y = torch.tanh(W @ y + batch @ u)
        return y


@pytest.mark.parametrize("solver", [None, *SOLVERS], ids=lambda s: type(s).__name__)
def test_gradcheck_on_an_equilibrium(solver: Solver | None) -> None:
    problem, batch = Equilibrium(), vector(15, 82).reshape(5, 3)
    W = vector(25, 83).reshape(5, 5)
    W = (0.7 * W / torch.linalg.matrix_norm(W, 2)).requires_grad_()
    tight = GMRES(50, rtol=1e-12) if solver is None else solver

    def solved(W: Tensor, u: Tensor) -> Tensor:
        lower = {"y": problem.solution(W, u, batch)}
        return lower_solution(problem, {"W": W, "u": u}, lower, [batch], tight)["y"]

    u = vector(3, 84).requires_grad_()
    assert torch.autograd.gradcheck(solved, (W, u))
    if solver is None:
        # The default solver is one for operators that are not symmetric.
        y = lower_solution(problem, {"W": W, "u": u}, {"y": problem.solution(W, u, batch)}, [batch])
        found = torch.autograd.grad(y["y"].sum(), u)[0]
        torch.testing.assert_close(found, torch.autograd.grad(solved(W, u).sum(), u)[0], rtol=1e-3, atol=1e-4)


def test_a_scalar_root_against_its_derivative() -> None:
    class Cubic(RootProblem):
        """y^3 + y = x, so that dy/dx = 1 / (3 y^2 + 1)."""

        symmetric = True

        def optimality(self, upper: Params, lower: Params, batch: Any) -> Params:
            return {"y": lower["y"] ** 3 + lower["y"] - upper["x"]}

    y = torch.tensor(0.7, dtype=torch.float64)
    x = (y**3 + y).requires_grad_()
    for solver in (CG(5, rtol=1e-12), GMRES(5, rtol=1e-12)):
        solved = lower_solution(Cubic(), {"x": x}, {"y": y}, NO_BATCH, solver)["y"]
        (found,) = torch.autograd.grad(solved.exp(), x)
        torch.testing.assert_close(found, y.exp() / (3.0 * y**2 + 1.0), rtol=1e-12, atol=0.0)


def test_a_map_that_does_not_contract() -> None:
    """T = x - 2 y: the adjoint iteration diverges and says so, the right answer is 1 / 3."""

    class Expanding(FixedPointProblem):
        def fixed_point_map(self, upper: Params, lower: Params, batch: Any) -> Params:
            return {"y": upper["x"] - 2.0 * lower["y"]}

    x = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)

    def gradient(solver: Solver) -> Tensor:
        return torch.autograd.grad(lower_solution(Expanding(), {"x": x}, {"y": x / 3.0}, NO_BATCH, solver)["y"], x)[0]

    torch.testing.assert_close(gradient(GMRES()), torch.tensor(1.0 / 3.0, dtype=torch.float64))
    with pytest.warns(SolverWarning, match="diverged"):
        gradient(AdjointIteration())


def test_what_is_no_fixed_point_is_flagged_in_the_backward_pass() -> None:
    problem, batch = Equilibrium(), vector(15, 82).reshape(5, 3)
    upper = {"W": 0.1 * torch.eye(5, dtype=torch.float64), "u": vector(3, 84).requires_grad_()}
    y = lower_solution(problem, upper, {"y": vector(5, 85)}, [batch])
    with pytest.warns(SolverWarning, match="no solution: y is no fixed point"):
        y["y"].sum().backward()
    assert y.record[0].stationarity > 0.1


def test_a_degenerate_active_set_is_flagged() -> None:
    problem = Constrained(lambda p: Box(high=p))
    x = vector(2, 81).requires_grad_()
    unbounded = torch.linalg.solve(A, C @ x.detach())
    p = unbounded.max()
    y = lower_solution(problem, {"x": x, "p": p}, {"y": unbounded}, NO_BATCH)
    with pytest.warns(SolverWarning, match="degenerate: 1 entries"):
        y["y"].sum().backward()


def test_the_record_says_which_entries_are_on_the_boundary() -> None:
    problem = Constrained(MAPS["box"][0])
    x, p = vector(2, 81).requires_grad_(), torch.tensor(0.2, dtype=torch.float64)
    values = problem.solution(x, p)
    y = lower_solution(problem, {"x": x, "p": p}, {"y": values}, NO_BATCH)
    y["y"].sum().backward()
    active = y.record[0].active_set
    assert active is not None
    above_low, above_high = active.reshape(2, 5)
    assert 0 < int((above_low < 0).sum()) + int((above_high > 0).sum()) < 5
    assert torch.equal(above_low < 0, values == -0.1)
    assert torch.equal(above_high > 0, values == 0.2)


def test_a_solver_for_symmetric_operators_is_refused_when_the_solution_is_made() -> None:
    upper = {"W": 0.1 * torch.eye(5, dtype=torch.float64), "u": vector(3, 84).requires_grad_()}
    with pytest.raises(ValueError, match="symmetric"):
        lower_solution(Equilibrium(), upper, {"y": vector(5, 85)}, [vector(15, 82).reshape(5, 3)], CG())


def test_the_systems_of_all_kinds_go_with_the_graph() -> None:
    problem = Constrained(MAPS["box"][0])
    x, p = vector(2, 81).requires_grad_(), torch.tensor(0.2, dtype=torch.float64)
    y = lower_solution(problem, {"x": x, "p": p}, {"y": problem.solution(x, p)}, NO_BATCH)
    node: Any = y["y"].grad_fn
    system = weakref.ref(node.saved_tensors[0].frozen.system)
    gc.collect()
    gc.disable()
    try:
        y["y"].sum().backward()
        assert system() is None
    finally:
        gc.enable()
