"""Hypergradients of fixed points and roots against dense algebra, on one process and on several."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import (
    CG,
    MINRES,
    AlternatingSchedule,
    Implicit,
    Level,
    Neumann,
    Params,
    SolverError,
    SolverWarning,
    Status,
    Trainer,
    check_hypergradient,
    functional_call,
    hypergradient,
    linearize,
    ridge,
)
from bilevel.distributed import rank, world_size
from bilevel.linear import GMRES, AdjointIteration, Dense, Solver
from bilevel.lower import L1, FixedPointProblem, ResidualProblem, RootProblem
from bilevel.products import FiniteDifference, ForwardOverReverse, HVPProvider, ReverseOverReverse
from tests.support.kinds.problems import EXACT, Cubic, Equilibrium, Line, Penalised, draw, f64, iterated
from tests.support.rank_processes import WORLDS, on_ranks

X = {"x": f64(0.4, -1.0, 0.7)}
START = {"y": torch.zeros(5, dtype=torch.float64)}
ONE: dict[str, Any] = {"upper_batch": None, "lower_batches": [1.0]}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("solver", [EXACT, AdjointIteration(300, rtol=1e-13), Dense()], ids=repr)
def test_an_equilibrium_against_a_dense_solve(solver: Solver, seed: int) -> None:
    problem = Equilibrium(seed)
    y = iterated(problem, X, START, [1.0], 300)
    result = hypergradient(problem, X, y, solver, **ONE, on_failure="raise")
    assert torch.allclose(result.grad["x"], problem.by_dense_algebra(X, y), atol=1e-10)
    assert torch.equal(result.direct["x"], X["x"])
    assert result.stationarity <= 1e-14
    assert result.active_set is None


@pytest.mark.parametrize("keep_graph", [False, True])
def test_over_several_batches_the_map_is_the_mean_of_theirs(keep_graph: bool) -> None:
    problem, batches = Equilibrium(1), (0.5, 1.0, 2.0)
    y = iterated(problem, X, START, batches, 300)
    method = Implicit(EXACT, hvp=ReverseOverReverse(keep_graph=keep_graph))
    result = hypergradient(problem, X, y, method, upper_batch=None, lower_batches=batches, on_failure="raise")
    assert torch.allclose(result.grad["x"], problem.by_dense_algebra(X, y, batches), atol=1e-10)
    parts = torch.stack([problem.residual(X, y, batch)["y"] for batch in batches])
    assert result.noise == pytest.approx(float((parts - parts.mean(0)).square().sum() / 6) ** 0.5, rel=1e-10)


def test_a_map_that_does_not_contract() -> None:
    """y = x - 2 y: the adjoint iteration diverges, and the derivative is 1/3 all the same."""
    x, y = {"x": f64(3.0)}, {"y": f64(1.0)}
    for solver in (GMRES(), Dense()):
        result = hypergradient(Line(-2.0), x, y, solver, **ONE, on_failure="raise")
        assert result.grad["x"] == pytest.approx(1.0 / 3.0, rel=1e-14)
    with pytest.warns(SolverWarning, match=r"diverged.*GMRES in place of AdjointIteration"):
        result = hypergradient(Line(-2.0), x, y, AdjointIteration(), **ONE)
    assert result.solution is not None
    assert result.solution.status is Status.DIVERGED
    contracting = hypergradient(Line(0.5), x, {"y": f64(6.0)}, AdjointIteration(99, rtol=1e-12), **ONE)
    assert contracting.grad["x"] == pytest.approx(2.0, rel=1e-11)


def test_a_scalar_root_and_one_of_several_numbers() -> None:
    problem = Cubic()
    for x in (f64(2.0), f64(-1.0, 0.5, 10.0)):
        y = problem.solve({"x": x})
        result = hypergradient(problem, {"x": x}, y, EXACT, **ONE, on_failure="raise")
        assert torch.allclose(result.grad["x"], 2.0 * y["y"] / (3.0 * y["y"] ** 2 + 1.0), rtol=1e-12)


def test_a_root_by_autograd_of_ones_own_is_the_smooth_minimum() -> None:
    """S = dG/dy is symmetric, and CG and MINRES serve where the problem says so."""
    hessian = (lambda a: a @ a.T + torch.eye(3, dtype=a.dtype))(draw(3, 3, seed=5))

    class Gradient(RootProblem):
        symmetric = True

        def optimality(self, upper: Params, lower: Params, batch: Any) -> Params:
            y = lower["y"]
            objective = 0.5 * y @ hessian @ y - upper["x"] @ y.tanh()
            return {"y": torch.autograd.grad(objective, y, create_graph=True)[0]}

        def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
            return (lower["y"] - 1.0).square().sum()

    y = {"y": torch.zeros(3, dtype=torch.float64)}
    for _ in range(60):
        with torch.enable_grad():
            point = {"y": y["y"].requires_grad_()}
            slope = Gradient().optimality(X, point, None)["y"]
            rows = torch.stack([torch.autograd.grad(s, point["y"], retain_graph=True)[0] for s in slope])
        y = {"y": (y["y"] - torch.linalg.solve(rows, slope)).detach()}
    t = y["y"].tanh()
    second = hessian + torch.diag(X["x"] * 2.0 * t * (1.0 - t**2))
    expected = (1.0 - t**2) * torch.linalg.solve(second, 2.0 * (y["y"] - 1.0))
    for solver in (CG(20, 1e-12), MINRES(20, 1e-12), EXACT, Dense()):
        result = hypergradient(Gradient(), X, y, solver, **ONE, on_failure="raise")
        assert torch.allclose(result.grad["x"], expected, rtol=1e-9)


def test_y_may_come_from_anywhere() -> None:
    """A closed form, and a problem that states its residual alone."""

    class Plain(ResidualProblem):
        def residual(self, upper: Params, lower: Params, batch: Any) -> Params:
            return {"y": lower["y"] - batch * upper["x"] ** 2}

        def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
            return lower["y"].sum()

    result = hypergradient(Plain(), X, {"y": 2.0 * X["x"] ** 2}, upper_batch=None, lower_batches=[2.0])
    assert result.failure is None
    assert torch.allclose(result.grad["x"], 4.0 * X["x"], rtol=1e-12)


@pytest.mark.parametrize("share", [1e-4, 0.1, 1.0])
def test_a_y_that_is_no_solution_is_flagged_by_the_norm_of_the_residual(share: float) -> None:
    fixed, root = Equilibrium(), Cubic()
    solutions = (iterated(fixed, X, START, [1.0], 300), root.solve(X))
    for problem, y, what in zip((fixed, root), solutions, ("fixed point", "root"), strict=True):
        off = {"y": (1.0 + share) * y["y"]}
        result = hypergradient(problem, X, off, EXACT, **ONE, on_failure="ignore")
        assert result.stationarity == pytest.approx(float(problem.residual(X, off, 1.0)["y"].norm()), rel=1e-12)
        if share < 1e-3:
            assert result.failure is None
            continue
        assert f"no solution: y is no {what}" in str(result.failure)
        with pytest.warns(SolverWarning, match="no solution"):
            hypergradient(problem, X, off, EXACT, **ONE)
        with pytest.raises(SolverError, match="no solution"):
            hypergradient(problem, X, off, EXACT, **ONE, on_failure="raise")


def test_the_units_of_a_root_do_not_matter() -> None:
    class Scaled(Cubic):
        def optimality(self, upper: Params, lower: Params, batch: Any) -> Params:
            return {"y": 1e6 * super().optimality(upper, lower, batch)["y"]}

    y = Cubic().solve(X)
    near = {"y": y["y"] * (1.0 + 1e-5)}
    result = hypergradient(Scaled(), X, near, EXACT, **ONE, on_failure="raise")
    assert result.stationarity > 1.0
    assert torch.allclose(result.grad["x"], hypergradient(Cubic(), X, near, EXACT, **ONE).grad["x"], rtol=1e-10)


def test_what_batches_explain_is_not_flagged() -> None:
    """The solution of all data, met with two batches of them."""
    problem = Equilibrium(2)
    y = iterated(problem, X, START, (0.0, 1.0, 2.0, 3.0), 300)
    one = hypergradient(problem, X, y, EXACT, upper_batch=None, lower_batches=[3.0], on_failure="ignore")
    two = hypergradient(problem, X, y, EXACT, upper_batch=None, lower_batches=[1.0, 3.0], on_failure="ignore")
    assert "no solution" in str(one.failure)
    assert two.stationarity_over_noise is not None
    assert two.stationarity_over_noise < 3.0
    assert two.failure is None


class Sum(FixedPointProblem):
    """Two variables that depend on each other, of which one may be held."""

    def fixed_point_map(self, upper: Params, lower: Params, batch: Any) -> Params:
        return {"y": upper["x"] + 0.5 * lower["z"], "z": 0.25 * lower["y"]}

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return lower["y"].sum() + 10.0 * lower["z"].sum()


def test_selections_and_tikhonov() -> None:
    # y = x + z/2, z = y/4: y = 8/7 x, z = 2/7 x.
    x = X["x"]
    both = {"y": 8.0 / 7.0 * x, "z": 2.0 / 7.0 * x}
    whole = hypergradient(Sum(), X, both, EXACT, **ONE)
    assert torch.allclose(whole.grad["x"], torch.full_like(x, 28.0 / 7.0), rtol=1e-12)
    alone = hypergradient(Sum(), X, both, Implicit(EXACT, implicit=["y"]), **ONE)
    assert torch.allclose(alone.grad["x"], torch.ones_like(x), rtol=1e-12)
    raised = linearize(Sum(), X, both, [1.0], tikhonov={"y": 2.0})
    v = {"y": f64(1.0, 0.0, 0.0), "z": f64(0.0, 1.0, 0.0)}
    plain = linearize(Sum(), X, both, [1.0]).operator(v)
    assert torch.equal(raised.operator(v)["y"], plain["y"] + 2.0 * v["y"])
    assert torch.equal(raised.operator(v)["z"], plain["z"])


def test_masks_repeat_and_no_buffer_is_written() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).double()
    weights = {name: p.detach().clone() for name, p in layer.named_parameters()}

    class Noisy(FixedPointProblem):
        def fixed_point_map(self, upper: Params, lower: Params, batch: Tensor) -> Params:
            return {"y": 0.1 * functional_call(layer, upper, (lower["y"] + batch,))}

        def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
            return lower["y"].square().sum()

    before = {name: value.clone() for name, value in layer.named_buffers()}
    system = linearize(Noisy(), weights, {"y": draw(8, 4, seed=1)}, [draw(8, 4, seed=2)])
    v = {"y": draw(8, 4, seed=3)}
    assert torch.equal(system.operator(v)["y"], system.operator(v)["y"])
    assert all(torch.equal(value, before[name]) for name, value in layer.named_buffers())
    weights["0.weight"].add_(1.0)
    with pytest.raises(RuntimeError, match="changed after linearize"):
        system.solve(v)


def test_central_differences_agree() -> None:
    for problem, start in ((Equilibrium(), START), (Cubic(), {"y": torch.zeros(3, dtype=torch.float64)})):

        def solver(which: Any, upper: Params, lower: Params, batches: Any) -> Params:
            return which.solve(upper) if isinstance(which, Cubic) else iterated(which, upper, lower, batches, 200)

        report = check_hypergradient(problem, X, start, **ONE, lower_solver=solver, tolerance=1e-7)
        assert report.agrees, report.verdict
    lazy = check_hypergradient(Equilibrium(), X, START, **ONE, lower_solver=lambda p, u, lower, b: lower)
    assert lazy.verdict.startswith("not solved")
    wrong = check_hypergradient(
        Equilibrium(), X, START, **ONE, lower_solver=solver, method=AdjointIteration(2, rtol=None)
    )
    assert wrong.verdict.startswith("wrong")


@pytest.mark.parametrize(
    "hvp", [ForwardOverReverse(), FiniteDifference(), "auto"], ids=["forward", "differences", "auto"]
)
def test_providers_of_second_derivatives_are_refused_by_name(hvp: HVPProvider | str) -> None:
    with pytest.raises(ValueError, match="of which there are vector-Jacobian products alone"):
        linearize(Equilibrium(), X, START, [1.0], hvp=hvp)  # type: ignore[arg-type]


def test_what_makes_no_sense_is_refused_by_name() -> None:
    class Ridged(Equilibrium):
        def regularizer(self, upper: Params, lower: Params) -> Tensor:
            return ridge(lower)

    class Short(Equilibrium):
        def fixed_point_map(self, upper: Params, lower: Params, batch: float) -> Params:
            return {"y": lower["y"][:2] + upper["x"][0]}

    class Bare(Equilibrium):
        def fixed_point_map(self, upper: Params, lower: Params, batch: float) -> Any:
            return lower["y"]

    class Deaf(Equilibrium):
        def fixed_point_map(self, upper: Params, lower: Params, batch: float) -> Params:
            return super().fixed_point_map(upper, {"y": lower["y"].detach()}, batch)

    for solver in (CG(), MINRES(), Neumann(scale=1.0)):
        with pytest.raises(ValueError, match="needs a symmetric operator"):
            linearize(Equilibrium(), X, START, [1.0], solver=solver)
    with pytest.raises(ValueError, match="use tikhonov"):
        linearize(Equilibrium(), X, START, [1.0], damping=0.1)
    with pytest.raises(ValueError, match="Ridged defines a regularizer"):
        linearize(Ridged(), X, START, [1.0])
    with pytest.raises(ValueError, match=r"Short.fixed_point_map must give .* shape \(5,\), got \(2,\)"):
        hypergradient(Short(), X, START, **ONE)
    with pytest.raises(TypeError, match=r"Bare.fixed_point_map must return a dict"):
        hypergradient(Bare(), X, START, **ONE)
    with pytest.raises(ValueError, match="fixed_point_map reaches none of the lower variables"):
        hypergradient(Deaf(), X, START, **ONE)
    with pytest.raises(TypeError, match="Equilibrium has no lower objective"):
        Equilibrium().lower_objective(X, START, 1.0)


def sharded() -> Tensor:
    """Each rank has a batch of its own."""
    batches = [0.5 + index for index in range(world_size())]
    problem = Equilibrium(3)
    y = iterated(problem, X, START, batches, 300)
    result = hypergradient(problem, X, y, EXACT, upper_batch=None, lower_batches=[batches[rank()]], on_failure="raise")
    return torch.stack([result.grad["x"], problem.by_dense_algebra(X, y, batches)])


def sharded_lasso() -> Tensor:
    """With a share of the smooth part on each rank, y after lower steps and dF/dx; beside them what they should be."""
    shares = [0.5 + index for index in range(world_size())]
    hessian = torch.eye(2, dtype=torch.float64) + 0.2
    problem = Penalised(hessian, f64(2.0, 0.3), f64(1.0, 1.0), lambda x: L1(x["weight"]))
    x, y = {"weight": torch.tensor(0.5, dtype=torch.float64)}, {"y": torch.zeros(2, dtype=torch.float64)}
    trainer = Trainer(
        problem,
        Level(x, torch.optim.SGD(x.values(), lr=0.0), [None]),
        Level(y, torch.optim.SGD(y.values(), lr=0.5, momentum=0.3), [shares[rank()]]),
        AlternatingSchedule(1, 120, 1),
        EXACT,
        on_failure="raise",
    )
    trainer.run()
    result = hypergradient(problem, x, y, EXACT, upper_batch=None, lower_batches=[shares[rank()]], on_failure="raise")
    first = (2.0 * sum(shares) / len(shares) - 0.5) / 1.2
    expected = f64(first, 0.0, -(first - 1.0) / 1.2)
    return torch.stack([torch.cat([y["y"], result.grad["weight"].reshape(1)]), expected])


def both() -> list[Tensor]:
    return [sharded(), sharded_lasso()]


def test_over_ranks_maps_are_averaged_and_gradients_before_a_proximal_map(tmp_path: Path) -> None:
    found = on_ranks(both, tmp_path)
    for world in WORLDS:
        for on_rank in found[world]:
            for part, same in zip(on_rank, found[world][0], strict=True):
                assert torch.allclose(part[0], part[1], atol=1e-10)
                assert torch.equal(part, same)
