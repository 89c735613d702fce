"""Hypergradients against the closed forms of quadratic, ridge and proximal problems."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import CG, Identity, Implicit, Neumann, Params, Status, hypergradient, linearize, proximal, ridge
from bilevel.linear import Dense, Solver
from bilevel.products import FiniteDifference, HVPProvider
from tests.support.cases import joined, vector
from tests.support.problems.closed_forms import (
    NO_BATCH,
    PROVIDERS,
    SOLVERS,
    Proximal,
    QuadraticBilevel,
    Ridge,
    proximal_point,
    quadratic,
    relative_error,
    run,
)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("hvp", PROVIDERS, ids=str)
def test_quadratic_closed_form(solver: Solver, hvp: HVPProvider) -> None:
    problem, upper, lower = quadratic()
    result = run(problem, upper, lower, Implicit(solver, hvp=hvp))
    v = joined(lower) - problem.t
    implicit = -problem.C @ torch.linalg.solve(problem.A, v)
    assert relative_error(joined(result.implicit), implicit) <= 1e-8
    assert relative_error(joined(result.grad), joined(upper) + implicit) <= 1e-8
    torch.testing.assert_close(result.direct, upper)
    assert float(result.loss) == pytest.approx(float(0.5 * v @ v + 0.5 * joined(upper).square().sum()), rel=1e-14)
    assert result.stationarity <= 1e-14
    assert result.solution is not None
    assert result.solution.status is Status.CONVERGED
    assert not any(leaf.requires_grad for leaf in (result.loss, *result.grad.values()))


def test_quadratic_total_derivative_by_differentiating_through_the_solution() -> None:
    problem, upper, lower = quadratic()
    x = joined(upper).clone().requires_grad_()
    optimum = -torch.linalg.solve(problem.A, problem.C.T @ x + problem.a)
    (reference,) = torch.autograd.grad(0.5 * (optimum - problem.t).square().sum() + 0.5 * x.square().sum(), x)
    assert relative_error(joined(run(problem, upper, lower, Dense()).grad), reference) <= 1e-12


@pytest.mark.parametrize("log_weight", [torch.tensor(-0.7, dtype=torch.float64), vector(5, 10)], ids=["scalar", "each"])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("hvp", [*PROVIDERS, FiniteDifference()], ids=str)
def test_ridge_closed_form(solver: Solver, hvp: HVPProvider, log_weight: Tensor) -> None:
    problem = Ridge()
    weights = log_weight.exp().expand(5)
    hessian = problem.X.T @ problem.X / 12 + torch.diag(weights)
    y = torch.linalg.solve(hessian, problem.X.T @ problem.target / 12)
    v = problem.X_val.T @ (problem.X_val @ y - problem.target_val) / 8
    per_feature = -weights * y * torch.linalg.solve(hessian, v)
    expected = per_feature if log_weight.dim() else per_feature.sum()
    if not hvp.exact:
        solver = {CG: CG(100, rtol=1e-8), Neumann: Neumann(500, rtol=1e-8)}.get(type(solver), solver)
    result = run(problem, {"log_weight": log_weight}, {"y": y}, Implicit(solver, hvp=hvp))
    assert relative_error(result.grad["log_weight"], expected) <= (1e-8 if hvp.exact else 1e-6)
    assert result.stationarity <= 1e-14


@pytest.mark.parametrize("damping", [0.0, 7.5])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("hvp", PROVIDERS, ids=str)
def test_proximal_closed_form(solver: Solver, hvp: HVPProvider, damping: float) -> None:
    problem, upper, lower = proximal_point()
    result = run(problem, upper, lower, Implicit(solver, hvp=hvp, damping=damping))
    c = 2.0 + damping
    hessian, v = problem.hessian(lower), 2.0 * (joined(lower) - 1.0)
    eye = torch.eye(5, dtype=torch.float64)
    expected = torch.linalg.solve(eye + hessian / c, v)
    assert relative_error(joined(result.implicit), expected) <= 1e-8
    assert relative_error(joined(result.implicit), c * torch.linalg.solve(hessian + c * eye, v)) <= 1e-8
    torch.testing.assert_close(joined(result.direct), -0.3 * joined(upper).sin())


def test_identity_gives_the_upper_gradient_itself() -> None:
    problem, upper, lower = proximal_point()
    result = run(problem, upper, lower, Implicit(Identity(), damping=3.0))
    y = {name: leaf.clone().requires_grad_() for name, leaf in lower.items()}
    v = torch.autograd.grad(problem.upper_objective(upper, y, None), list(y.values()))
    assert result.solution is not None
    for found, implicit, reference in zip(result.solution.value.values(), result.implicit.values(), v, strict=True):
        assert torch.equal(found, reference)
        assert torch.equal(implicit, reference)
    assert (result.solution.num_hvps, result.solution.status) == (0, Status.BUDGET)


def test_stationarity_of_the_proximal_problem() -> None:
    problem, upper, lower = proximal_point()
    y = {name: leaf.clone().requires_grad_() for name, leaf in lower.items()}
    total = problem.lower_objective(upper, y, None) + (joined(y) - joined(upper)).square().sum()
    reference = torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, list(y.values()))]).norm()
    result = run(problem, upper, lower, Implicit(damping=5.0))
    assert result.stationarity == pytest.approx(float(reference), rel=1e-12)


@pytest.mark.parametrize("central", [True, False])
def test_finite_differences_to_their_own_tolerance(central: bool) -> None:
    problem, upper, lower = proximal_point()
    reference = run(problem, upper, lower, Dense())
    found = run(problem, upper, lower, Implicit(CG(50, rtol=1e-8), hvp=FiniteDifference(central=central)))
    assert relative_error(joined(found.grad), joined(reference.grad)) <= (1e-8 if central else 1e-6)


def test_implicit_subset_holds_the_other_variables_fixed() -> None:
    problem, upper, lower = quadratic()
    result = run(problem, upper, lower, Implicit(Dense(), implicit=["body"]))
    v = (joined(lower) - problem.t)[1:]
    expected = joined(upper) - problem.C[:, 1:] @ torch.linalg.solve(problem.A[1:, 1:], v)
    assert relative_error(joined(result.grad), expected) <= 1e-12
    assert result.solution is not None
    assert list(result.solution.value) == ["body"]


def test_variables_that_nothing_uses_get_zeros() -> None:
    class Sparse(QuadraticBilevel):
        def lower_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
            used = {name: lower[name] for name in ("head", "body")}
            return super().lower_objective({name: upper[name] for name in ("x", "scale")}, used, batch)

        def upper_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
            return (lower["head"] - 1.0) ** 2

    reference, upper, lower = quadratic()
    upper = {**upper, "idle": vector(2)}
    lower = {**lower, "spare": vector(3), "none": vector(0)}
    for hvp in PROVIDERS:
        for solver in SOLVERS:
            result = run(Sparse(), upper, lower, Implicit(solver, hvp=hvp))
            v = torch.zeros(5, dtype=torch.float64)
            v[0] = 2.0 * (lower["head"] - 1.0)
            expected = -reference.C @ torch.linalg.solve(reference.A, v)
            assert relative_error(joined({n: result.grad[n] for n in ("x", "scale")}), expected) <= 1e-8
            assert not result.grad["idle"].any()
            assert result.solution is not None
            assert not result.solution.value["spare"].any()


def test_an_upper_objective_that_is_flat_in_the_lower_variables_needs_no_product() -> None:
    class Flat(QuadraticBilevel):
        def upper_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
            return joined(upper).square().sum() + 0.0 * joined(lower).sum()

    _, upper, lower = quadratic()
    result = run(Flat(), upper, lower)
    assert not joined(result.implicit).any()
    torch.testing.assert_close(joined(result.grad), 2.0 * joined(upper))
    assert result.solution is not None
    assert (result.solution.status, result.solution.num_hvps) == (Status.CONVERGED, 0)


def test_a_system_serves_many_upper_batches() -> None:
    class Targets(Proximal):
        def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
            return (joined(lower) - batch).square().sum()

    _, upper, lower = proximal_point()
    problem = Targets()
    for solver in SOLVERS:
        system = linearize(problem, upper, lower, NO_BATCH, solver=solver)
        for target in (0.0, 1.0, -3.0):
            one = system.hypergradient(target)
            fresh = hypergradient(problem, upper, lower, solver, upper_batch=target, lower_batches=NO_BATCH)
            assert relative_error(joined(one.grad), joined(fresh.grad)) <= 1e-9


def test_a_good_start_saves_iterations() -> None:
    problem, upper, lower = proximal_point()
    system = linearize(problem, upper, lower, NO_BATCH, solver=CG(50, rtol=1e-8))
    first = system.hypergradient(None)
    assert first.solution is not None
    again = system.hypergradient(None, x0=first.solution.value)
    assert again.solution is not None
    assert again.solution.iterations == 0
    assert relative_error(joined(again.grad), joined(first.grad)) <= 1e-7


def test_nothing_is_written_and_grad_mode_does_not_matter() -> None:
    problem, upper, lower = proximal_point()
    for x in (upper, lower):
        x.update({name: torch.nn.Parameter(leaf) for name, leaf in x.items()})
    held = {name: leaf.detach().clone() for name, leaf in lower.items()}
    mark = torch.ones(2, dtype=torch.float64)
    lower["a"].grad = mark
    reference = run(problem, upper, lower)
    with torch.no_grad():
        quiet = run(problem, upper, lower)
    assert all(torch.equal(quiet.grad[name], reference.grad[name]) for name in upper)
    assert lower["a"].grad is mark
    assert torch.equal(mark, torch.ones(2, dtype=torch.float64))
    assert lower["b"].grad is None
    assert all(leaf.grad is None and leaf._version == 0 for leaf in upper.values())
    assert all(torch.equal(lower[name], held[name]) and lower[name]._version == 0 for name in lower)


def test_float32_right_hand_sides_far_below_one() -> None:
    class Faint(Proximal):
        data = Proximal.data.float()

        def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
            return batch * (joined(lower) - 1.0).square().sum()

    _, upper, lower = proximal_point()
    upper, lower = ({name: leaf.float() for name, leaf in x.items()} for x in (upper, lower))
    for hvp in (*PROVIDERS, FiniteDifference()):
        for solver in (CG(20, rtol=1e-4), Neumann(20), Dense(), Identity()):
            one, faint = (
                hypergradient(Faint(), upper, lower, Implicit(solver, hvp=hvp), upper_batch=f, lower_batches=NO_BATCH)
                for f in (1.0, 2.0**-100)
            )
            assert torch.equal(joined(faint.grad), joined(one.grad) * 2.0**-100)


def test_ready_made_regularizers() -> None:
    upper, lower = {"u": vector(3, 0), "a": vector(2, 1)}, {"a": vector(2, 2), "w": vector(3, 3)}
    paired = proximal(upper, lower, {"w": "u"})
    assert float(paired) == pytest.approx(0.5 * float((lower["w"] - upper["u"]).square().sum()), rel=1e-14)
    assert float(ridge(lower)) == pytest.approx(0.5 * float(joined(lower).square().sum()), rel=1e-14)
    assert float(proximal(lower, lower)) == 0.0
    for pairs, match in (({}, "no pairs"), ({"w": "a"}, "shape"), ({"w": "z"}, "no upper 'z'"), (None, "no upper 'w'")):
        with pytest.raises(ValueError, match=match):
            proximal(upper, lower, pairs)


def test_a_problem_without_state_refuses_a_state() -> None:
    problem = Proximal()
    assert problem.state_dict() == {}
    problem.load_state_dict({})
    with pytest.raises(ValueError, match="Proximal: the state's 'target' is not that of a module here"):
        problem.load_state_dict({"target": 1})
