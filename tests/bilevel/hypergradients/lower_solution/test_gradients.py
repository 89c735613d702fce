"""The gradients through a lower solution: finite differences, closed forms, and those of `hypergradient`."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import CG, MINRES, Implicit, Neumann, Params, Problem, functional_call, hypergradient
from bilevel.hypergradients import lower_solution
from bilevel.linear import Dense, Nystrom, Solver
from bilevel.products import HVPProvider
from tests.bilevel.hypergradients.lower_solution.fits import (
    EXACT,
    TARGET,
    LogisticFit,
    RidgeFit,
    X,
    fitted,
    logistic_solution,
    ridge_solution,
)
from tests.support.cases import joined, vector
from tests.support.problems.closed_forms import (
    NO_BATCH,
    PROVIDERS,
    Proximal,
    QuadraticBilevel,
    proximal_point,
    quadratic,
)

SOLVERS: list[Solver] = [EXACT, Neumann(3000, rtol=1e-12), MINRES(50, rtol=1e-12), Dense(), Nystrom(5)]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("shape", [(), (5,)], ids=["scalar", "each"])
def test_gradcheck_on_ridge_regression(solver: Solver, shape: tuple[int, ...]) -> None:
    log_weight = vector(5, 20)[: 5 if shape else 1].reshape(shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fitted(x, solver)["y"], log_weight)


@pytest.mark.parametrize("hvp", PROVIDERS, ids=str)
def test_gradcheck_on_logistic_regression_solved_by_newton(hvp: HVPProvider) -> None:
    problem, batch = LogisticFit(), (X, (TARGET > 0).double())

    def solved(weights: Tensor, log_ridge: Tensor) -> tuple[Tensor, ...]:
        upper = {"weights": weights, "log_ridge": log_ridge}
        lower = logistic_solution(problem, upper, batch)
        return tuple(lower_solution(problem, upper, lower, [batch], Implicit(EXACT, hvp=hvp)).values())

    weights, log_ridge = vector(12, 21).requires_grad_(), vector(1, 22)[0].requires_grad_()
    assert torch.autograd.gradcheck(solved, (weights, log_ridge))


def with_gradients(variables: Params) -> Params:
    return {name: leaf.clone().requires_grad_() for name, leaf in variables.items()}


@pytest.mark.parametrize("point", [quadratic, proximal_point], ids=["quadratic", "proximal"])
@pytest.mark.parametrize("hvp", PROVIDERS, ids=str)
def test_the_loss_above_gives_the_hypergradient(point: Any, hvp: HVPProvider) -> None:
    problem, upper, lower = point()
    method = Implicit(EXACT, hvp=hvp)
    reference = hypergradient(problem, upper, lower, method, upper_batch=None, lower_batches=NO_BATCH)
    assert any(leaf.any() for leaf in reference.direct.values())
    x = with_gradients(upper)
    y = lower_solution(problem, x, lower, NO_BATCH, method)
    loss = problem.upper_objective(x, y, None)
    loss.backward()
    assert torch.equal(loss.detach(), reference.loss)
    torch.testing.assert_close({name: leaf.grad for name, leaf in x.items()}, reference.grad, rtol=1e-12, atol=1e-14)
    (made,) = y.record
    assert reference.solution is not None
    assert (made.solution.status, made.stationarity) == (reference.solution.status, reference.stationarity)


def test_damping_and_tikhonov_are_those_of_the_method() -> None:
    problem, upper, lower = proximal_point()
    method = Implicit(EXACT, damping=3.0, tikhonov={"a": 0.5})
    reference = hypergradient(problem, upper, lower, method, upper_batch=None, lower_batches=NO_BATCH)
    x = with_gradients(upper)
    problem.upper_objective(upper, lower_solution(problem, x, lower, NO_BATCH, method), None).backward()
    torch.testing.assert_close(
        {name: leaf.grad for name, leaf in x.items()}, reference.implicit, rtol=1e-12, atol=1e-14
    )


def test_values_are_the_given_ones_with_their_dtypes_and_shapes() -> None:
    problem, upper, lower = quadratic()
    lower = {"head": lower["head"].float(), "body": lower["body"]}
    x = with_gradients({"x": upper["x"].float(), "scale": upper["scale"]})
    y = lower_solution(problem, x, lower, NO_BATCH)
    assert isinstance(y, dict)
    torch.testing.assert_close(dict(y), lower, rtol=0.0, atol=0.0)
    assert all(leaf.requires_grad and not leaf.is_leaf for leaf in y.values())
    sum(leaf.double().sum() for leaf in y.values()).backward()  # type: ignore[union-attr]
    assert [(n, leaf.grad.dtype, leaf.grad.shape) for n, leaf in x.items() if leaf.grad is not None] == [
        ("x", torch.float32, (3,)),
        ("scale", torch.float64, ()),
    ]


def test_upper_variables_that_are_computed_and_others_beside_y() -> None:
    """x comes from a module whose input has a gradient too; another parameter stands in the loss alone."""

    def value(module: nn.Linear, inputs: Tensor, offset: Tensor, y: Any) -> Tensor:
        return ((X[:4] @ y(module(inputs)) + offset - TARGET[:4]) ** 2).mean() + 0.1 * module.weight.square().sum()

    module, inputs, offset = nn.Linear(3, 5).double(), vector(3, 23).requires_grad_(), vector(1, 24).requires_grad_()
    wanted = [*module.parameters(), inputs, offset]
    found = torch.autograd.grad(value(module, inputs, offset, lambda x: fitted(x)["y"]), wanted)
    expected = torch.autograd.grad(value(module, inputs, offset, ridge_solution), wanted)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_only_tensors_that_require_gradients_get_them() -> None:
    problem, upper, lower = quadratic()
    x = {"x": upper["x"].clone().requires_grad_(), "scale": upper["scale"]}
    y = lower_solution(problem, x, lower, NO_BATCH, EXACT)
    y["body"].sum().backward()
    assert x["scale"].grad is None
    ones = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    expected = -problem.C @ torch.linalg.solve(problem.A, ones)
    torch.testing.assert_close(x["x"].grad, expected[:3], rtol=1e-9, atol=1e-12)


def test_a_loss_that_uses_some_variables_only() -> None:
    problem, upper, lower = quadratic()
    x = with_gradients(upper)
    y = lower_solution(problem, x, lower, NO_BATCH, EXACT)
    (3.0 * y["head"]).backward()
    right = torch.tensor([3.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    expected = -problem.C @ torch.linalg.solve(problem.A, right)
    torch.testing.assert_close(torch.cat([x["x"].grad, x["scale"].grad.reshape(1)]), expected, rtol=1e-9, atol=1e-12)  # type: ignore


def test_variables_that_are_held_fixed_are_constants() -> None:
    problem, upper, lower = quadratic()
    x = with_gradients(upper)
    y = lower_solution(problem, x, lower, NO_BATCH, Implicit(EXACT, implicit=["body"]))
    assert list(y) == list(lower)
    assert not y["head"].requires_grad
    (y["body"].sum() + y["head"]).backward()
    expected = -problem.C[:, 1:] @ torch.linalg.solve(problem.A[1:, 1:], torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(torch.cat([x["x"].grad, x["scale"].grad.reshape(1)]), expected, rtol=1e-9, atol=1e-12)  # type: ignore


def test_two_solutions_in_one_loss_and_one_above_the_other() -> None:
    class Smoothed(Problem):
        """y = (x - shift) / 3, minimizes the distances to x and to the shift."""

        def lower_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
            return 0.5 * (lower["z"] - upper["y"]).square().sum() + (lower["z"] + 0.5 * upper["shift"]).square().sum()

    def smoothed(y: Tensor, shift: Tensor) -> Tensor:
        return (y - shift) / 3.0

    def layer(y: Tensor, shift: Tensor) -> Tensor:
        return lower_solution(Smoothed(), {"y": y, "shift": shift}, {"z": smoothed(y, shift)}, NO_BATCH, EXACT)["z"]

    def value(first: Any, second: Any) -> Tensor:
        y = first(log_weight)
        return second(y, shift).square().sum() + first(2.0 * log_weight).sin().sum() + (y * shift).sum()

    log_weight, shift = vector(5, 25).requires_grad_(), vector(5, 26).requires_grad_()
    found = torch.autograd.grad(value(lambda x: fitted(x)["y"], layer), [log_weight, shift])
    expected = torch.autograd.grad(value(ridge_solution, smoothed), [log_weight, shift])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_solution_within_the_upper_objective_of_another_problem() -> None:
    """Three levels, of which the hypergradient takes first derivatives only."""

    class Above(Problem):
        """y = x0^2 and F = sum of squares of the ridge solution at log-weights y."""

        def __init__(self, layer: bool) -> None:
            self.layer = layer

        def lower_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
            return 0.5 * (lower["log_weight"] - upper["x"].square()).square().sum()

        def upper_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
            log_weight = lower["log_weight"]
            y = fitted(log_weight)["y"] if self.layer else ridge_solution(log_weight)
            return y.square().sum()

    x = vector(5, 27)
    results = [
        hypergradient(
            Above(layer), {"x": x}, {"log_weight": x.square()}, EXACT, upper_batch=None, lower_batches=NO_BATCH
        )
        for layer in (True, False)
    ]
    torch.testing.assert_close(results[0].grad, results[1].grad, rtol=1e-9, atol=1e-12)


def test_the_solution_binds_modules_above() -> None:
    """A network fitted to upper values of its own parameters, called with its solution in an ordinary loop."""
    net = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1)).double()

    class Near(Proximal):
        def lower_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
            return 0.5 * joined(lower).square().sum()

    start = {name: leaf.detach().clone().requires_grad_() for name, leaf in net.named_parameters()}
    optimizer, losses = torch.optim.SGD(start.values(), lr=0.5), []
    for _ in range(20):
        # The minimum of |y|^2 / 2 + |y - x|^2.
        values = {name: 2.0 / 3.0 * leaf for name, leaf in start.items()}
        y = lower_solution(Near(), start, values, NO_BATCH, CG(5))
        loss = (functional_call(net, y, X).squeeze(1) - TARGET).square().mean()
        optimizer.zero_grad()
        loss.backward()
        plain = torch.autograd.grad(
            (functional_call(net, values, X).squeeze(1) - TARGET).square().mean(), list(start.values())
        )
        torch.testing.assert_close([leaf.grad for leaf in start.values()], list(plain), rtol=1e-9, atol=1e-12)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_several_batches_are_one_objective() -> None:
    log_weight = vector(5, 28).requires_grad_()
    halves = [(X[:6], TARGET[:6]), (X[6:], TARGET[6:])]
    y = lower_solution(RidgeFit(), {"log_weight": log_weight}, {"y": ridge_solution(log_weight)}, halves, EXACT)
    found = torch.autograd.grad(y["y"].sum(), log_weight)
    expected = torch.autograd.grad(fitted(log_weight)["y"].sum(), log_weight)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert y.record[0].noise is not None


def test_a_solution_that_was_computed_with_a_graph_is_taken_by_value() -> None:
    problem, upper, _ = quadratic()
    x = with_gradients(upper)
    flat = problem.solution(x)
    y = lower_solution(problem, x, {"y": flat}, NO_BATCH, EXACT)
    found = torch.autograd.grad(y["y"].square().sum(), list(x.values()))
    expected = torch.autograd.grad(QuadraticBilevel().solution(x).square().sum(), list(x.values()))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
