"""The penalty hypergradient against the closed form of quadratic problems."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import (
    Hypergradient,
    Implicit,
    Params,
    Penalty,
    Problem,
    SolverError,
    SolverWarning,
    functional_call,
    hypergradient,
)
from bilevel.hypergradients.updates.update import AdamUpdate, SGDUpdate
from bilevel.linear import Dense
from tests.support.cases import joined, vector, with_spectrum


class Quadratic(Problem):
    """G = 1/2 y'Ay + batch x'Cy + lambda/2 |y|^2; F = curvature/2 |y - t|^2 - t'y + 1/2 |x|^2."""

    regularization_weight = 0.5
    A = with_spectrum([0.5, 0.8, 1.0, 2.0, 3.0])
    C = vector(15, 1).reshape(3, 5)
    t = vector(5, 3)
    hessian = A + 0.5 * torch.eye(5, dtype=torch.float64)

    def __init__(self, curvature: float) -> None:
        self.curvature = curvature

    def lower_objective(self, upper: Params, lower: Params, batch: float) -> Tensor:
        y = joined(lower)
        return 0.5 * y @ self.A @ y + batch * (upper["x"] @ self.C @ y)

    def upper_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
        y = joined(lower)
        return 0.5 * self.curvature * (y - self.t).square().sum() - self.t @ y + 0.5 * upper["x"].square().sum()

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return 0.5 * joined(lower).square().sum()

    def optimum(self, upper: Params) -> Params:
        y = -torch.linalg.solve(self.hessian, self.C.T @ upper["x"])
        return {"a": y[:2], "b": y[2:]}


UPPER = {"x": vector(3, 4)}


def run(
    problem: Problem,
    lower: Params,
    *,
    steps: int = 45,
    lower_batches: Any = None,
    on_failure: Any = "warn",
    **options: Any,
) -> Hypergradient:
    method = Penalty(**{"update": SGDUpdate(0.44), "penalty": 10.0, **options})
    batches = [1.0] * steps if lower_batches is None else lower_batches
    return hypergradient(problem, UPPER, lower, method, upper_batch=None, lower_batches=batches, on_failure=on_failure)


def exact(problem: Quadratic, lower: Params, **options: Any) -> Hypergradient:
    method = Implicit(Dense(), **options)
    return hypergradient(problem, UPPER, lower, method, upper_batch=None, lower_batches=[1.0])


def relative_error(found: Params, reference: Params) -> float:
    return float((joined(found) - joined(reference)).norm() / joined(reference).norm())


@pytest.mark.parametrize("penalty", [0.5, 10.0, 1000.0])
def test_exact_for_a_linear_upper_and_a_quadratic_lower_level(penalty: float) -> None:
    problem = Quadratic(0.0)
    lower = problem.optimum(UPPER)
    result, reference = run(problem, lower, penalty=penalty), exact(problem, lower)
    assert relative_error(result.grad, reference.grad) <= 1e-10
    assert relative_error(result.implicit, reference.implicit) <= 1e-10
    assert torch.equal(result.direct["x"], UPPER["x"])
    assert result.stationarity <= 1e-14
    assert result.solution is None
    # z minimises G + F / sigma.
    z = -torch.linalg.solve(problem.hessian, problem.C.T @ UPPER["x"] - problem.t / penalty)
    assert result.lower is not None
    torch.testing.assert_close(joined(result.lower), z, rtol=1e-10, atol=1e-11)


def test_error_is_of_the_order_of_one_over_the_penalty() -> None:
    problem = Quadratic(1.0)
    lower = problem.optimum(UPPER)
    reference = exact(problem, lower)
    errors = [relative_error(run(problem, lower, penalty=sigma).grad, reference.grad) for sigma in (50.0, 500.0)]
    assert errors[0] <= 0.05
    assert errors[1] == pytest.approx(errors[0] / 10.0, rel=0.1)
    # The whole value by the closed form: sigma (cross)'(z - y), with z the penalised minimum.
    sigma, eye = 50.0, torch.eye(5, dtype=torch.float64)
    z = torch.linalg.solve(problem.hessian + eye / sigma, 2.0 * problem.t / sigma - problem.C.T @ UPPER["x"])
    expected = UPPER["x"] + sigma * problem.C @ (z - joined(lower))
    torch.testing.assert_close(run(problem, lower, penalty=sigma).grad["x"], expected, rtol=1e-10, atol=0.0)


def test_carried_copies_go_on_where_they_were() -> None:
    problem = Quadratic(1.0)
    lower = problem.optimum(UPPER)
    half = run(problem, lower, steps=2)
    whole, carried = run(problem, lower, steps=4), run(problem, lower, steps=2, penalized=half.lower)
    assert whole.lower is not None
    assert carried.lower is not None
    assert torch.equal(joined(carried.lower), joined(whole.lower))
    assert relative_error(half.grad, whole.grad) > 1e-3
    torch.testing.assert_close(carried.grad["x"], whole.grad["x"], rtol=1e-13, atol=0.0)


def test_steps_and_means_by_hand() -> None:
    problem, batches = Quadratic(1.0), [0.5, 1.5, 2.0]
    lower = {"a": vector(2, 7), "b": vector(3, 8)}
    result = run(problem, lower, lower_batches=batches, update=SGDUpdate(0.1, momentum=0.5))
    z, velocity, y = joined(lower).clone(), torch.zeros(5, dtype=torch.float64), joined(lower)
    for batch in batches:
        slope = problem.hessian @ z + batch * problem.C.T @ UPPER["x"] + (z - 2.0 * problem.t) / 10.0
        velocity = 0.5 * velocity + slope
        z = z - 0.1 * velocity
    assert result.lower is not None
    torch.testing.assert_close(joined(result.lower), z, rtol=1e-13, atol=1e-14)
    mean = sum(batches) / 3
    torch.testing.assert_close(result.implicit["x"], 10.0 * mean * problem.C @ (z - y), rtol=1e-12, atol=0.0)
    stationarity = (problem.hessian @ y + mean * problem.C.T @ UPPER["x"]).norm()
    assert result.stationarity == pytest.approx(float(stationarity), rel=1e-12)
    assert float(result.loss) == pytest.approx(float(problem.upper_objective(UPPER, result.lower, None)), rel=1e-13)


def test_implicit_subset_holds_the_other_variables_fixed() -> None:
    problem = Quadratic(0.0)
    lower = problem.optimum(UPPER)
    result = run(problem, lower, implicit=["b"])
    assert result.lower is not None
    assert torch.equal(result.lower["a"], lower["a"])
    assert relative_error(result.grad, exact(problem, lower, implicit=["b"]).grad) <= 1e-10


def test_masks_are_the_same_at_both_points_and_buffers_stay() -> None:
    class Masked(Problem):
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)).double()

        def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
            return (functional_call(self.net, lower, (batch,)).squeeze(1) - upper["x"]).square().mean()

        def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
            return torch.stack([leaf.sum() for leaf in lower.values()]).sum() * 0.0

    problem = Masked()
    before = {name: leaf.clone() for name, leaf in problem.net.state_dict().items()}
    lower = {name: leaf.detach().clone() for name, leaf in problem.net.named_parameters()}
    batch = vector(9, 5).reshape(3, 3)
    # Without a step z = y, and the difference of the two gradients is exactly zero if their masks agree.
    result = run(problem, lower, lower_batches=[batch, batch], update=SGDUpdate(0.0))
    assert not joined(result.implicit).any()
    assert all(torch.equal(leaf, before[name]) for name, leaf in problem.net.state_dict().items())


def test_what_is_not_finite_is_reported_and_kept() -> None:
    problem = Quadratic(1.0)
    lower = problem.optimum(UPPER)
    broken: dict[str, Any] = {"lower_batches": [1.0, math.nan]}
    with pytest.warns(SolverWarning, match="non-finite"):
        assert joined(run(problem, lower, **broken).grad).isnan().any()
    with pytest.raises(SolverError, match="lower the learning rate"):
        run(problem, lower, on_failure="raise", **broken)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(problem, lower, on_failure="ignore", **broken)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"penalty": 0.0}, ValueError, "Penalty: penalty must be a positive number"),
        ({"penalty": math.nan}, ValueError, "Penalty: penalty must be a positive number"),
        ({"update": lambda x: AdamUpdate(0.1)}, TypeError, "Penalty: update must be an Update"),
        ({"penalized": {"a": vector(2)}}, ValueError, "Penalty: penalized must have the names and shapes"),
        ({"penalized": [vector(2)]}, TypeError, "Penalty: penalized must be a dict"),
        ({"implicit": ["c"]}, ValueError, "implicit names"),
        ({"lower_batches": []}, ValueError, "lower_batches is empty"),
        ({"implicit": "a"}, TypeError, "Penalty: implicit must be names of lower variables"),
        ({"on_failure": "shout"}, ValueError, "on_failure must be one of"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    problem = Quadratic(1.0)
    with pytest.raises(error, match=message):
        run(problem, problem.optimum(UPPER), **options)
