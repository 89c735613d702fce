"""Unrolled hypergradients against closed forms, hand-written loops and central differences of the whole procedure."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import Neumann, Params, Problem, hypergradient
from bilevel.hypergradients.updates.torch_updates import TorchUpdate, from_optimizer
from bilevel.hypergradients.updates.update import AdamUpdate, SGDUpdate, Update
from bilevel.linear import Dense
from tests.support.cases import joined, vector
from tests.support.problems.unrolled_cases import (
    BATCHES,
    BOTH,
    PROCEDURES,
    UPPER_BATCH,
    Quadratic,
    quadratic,
    relative_error,
    smooth,
    split,
    unroll,
)


@BOTH
@pytest.mark.parametrize("name", PROCEDURES)
def test_equals_automatic_differentiation_of_a_plain_loop(name: str, recompute: bool) -> None:
    update, loop = PROCEDURES[name]
    problem, upper, lower = smooth()
    x = {key: leaf.clone().requires_grad_() for key, leaf in upper.items()}
    y = loop(problem, x, {key: leaf.clone().requires_grad_() for key, leaf in lower.items()}, BATCHES)
    value = problem.upper_objective(x, y, UPPER_BATCH)
    total = torch.autograd.grad(value, list(x.values()), allow_unused=True, materialize_grads=True, retain_graph=True)
    fixed = {key: leaf.detach() for key, leaf in y.items()}
    direct = torch.autograd.grad(
        problem.upper_objective(x, fixed, UPPER_BATCH), list(x.values()), allow_unused=True, materialize_grads=True
    )
    result = unroll(problem, upper, lower, update, recompute=recompute)
    for key, whole, part in zip(x, total, direct, strict=True):
        torch.testing.assert_close(result.grad[key], whole, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(result.direct[key], part, rtol=1e-13, atol=0.0)
        torch.testing.assert_close(result.grad[key], result.direct[key] + result.implicit[key], rtol=0.0, atol=0.0)
    assert result.lower is not None
    for key, leaf in fixed.items():
        torch.testing.assert_close(result.lower[key], leaf, rtol=1e-12, atol=1e-14)
    assert float(result.loss) == pytest.approx(float(value.detach()), rel=1e-12)
    assert result.solution is None
    assert not any(t.requires_grad for t in (result.loss, *result.grad.values(), *result.lower.values()))


@pytest.mark.parametrize("name", PROCEDURES)
def test_equals_central_differences_of_the_whole_procedure(name: str) -> None:
    update, loop = PROCEDURES[name]
    problem, upper, lower = smooth()
    found = joined(unroll(problem, upper, lower, update).grad)
    flat, h = joined(upper), 1e-5

    def value(z: Tensor) -> float:
        y = {key: leaf.clone().requires_grad_() for key, leaf in lower.items()}
        x = split(z, upper)
        return float(problem.upper_objective(x, loop(problem, x, y, BATCHES), UPPER_BATCH).detach())

    differences = [(value(flat + h * e) - value(flat - h * e)) / (2 * h) for e in torch.eye(len(flat)).double()]
    torch.testing.assert_close(found, torch.tensor(differences, dtype=torch.float64), rtol=1e-6, atol=1e-8)


@BOTH
@pytest.mark.parametrize("weight", [0.0, 0.7])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_steps_from_the_optimum_are_a_neumann_series(steps: int, weight: float, recompute: bool) -> None:
    problem, upper, lower = quadratic(weight)
    options: dict[str, Any] = {"upper_batch": None, "recompute": recompute}
    result = unroll(problem, upper, lower, SGDUpdate(0.3), lower_batches=[1.0] * steps, **options)
    # The system is divided by the weight of the regularizer, so the step is multiplied by it.
    series = hypergradient(
        problem,
        upper,
        lower,
        Neumann(steps, rtol=None, scale=0.3 * (weight or 1.0)),
        upper_batch=None,
        lower_batches=[1.0],
    )
    assert relative_error(joined(result.implicit), joined(series.implicit)) <= 1e-13
    assert relative_error(joined(result.grad), joined(series.grad)) <= 1e-13
    assert result.lower is not None
    assert relative_error(joined(result.lower), joined(lower)) <= 1e-14
    # And once more by the closed form.
    hessian = problem.A + 0.0
    hessian[1:4, 1:4] += weight * torch.eye(3, dtype=torch.float64)
    cross = problem.C.clone()
    cross[:3, 1:4] -= weight * torch.eye(3, dtype=torch.float64)
    decay = torch.linalg.matrix_power(torch.eye(5, dtype=torch.float64) - 0.3 * hessian, steps)
    v = joined(lower) - problem.t
    expected = -cross @ (torch.linalg.solve(hessian, v - decay @ v))
    assert relative_error(joined(result.implicit), expected) <= 1e-12


@BOTH
@pytest.mark.parametrize("update", [SGDUpdate(0.5), SGDUpdate(0.3, momentum=0.5)], ids=["plain", "momentum"])
def test_unrolled_to_convergence_is_the_implicit_hypergradient(update: Update, recompute: bool) -> None:
    problem, upper, optimum = quadratic(0.4)
    lower = {name: leaf + 1.0 for name, leaf in optimum.items()}
    result = unroll(problem, upper, lower, update, upper_batch=None, lower_batches=[1.0] * 90, recompute=recompute)
    exact = hypergradient(problem, upper, optimum, Dense(), upper_batch=None, lower_batches=[1.0])
    assert relative_error(joined(result.grad), joined(exact.grad)) <= 1e-8
    assert result.stationarity <= 1e-8
    truncated = unroll(problem, upper, lower, update, upper_batch=None, lower_batches=[1.0] * 90, steps=70)
    assert relative_error(joined(truncated.grad), joined(exact.grad)) <= 1e-8


def test_unrolled_ridge_with_log_weights() -> None:
    class Ridge(Problem):
        X, target, X_val, target_val = (
            vector(60, 6).reshape(12, 5),
            vector(12, 7),
            vector(40, 8).reshape(8, 5),
            vector(8, 9),
        )

        def lower_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
            fit = 0.5 * (self.X @ lower["y"] - self.target).square().mean()
            return fit + 0.5 * (upper["log_weight"].exp() * lower["y"].square()).sum()

        def upper_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
            return 0.5 * (self.X_val @ lower["y"] - self.target_val).square().mean()

    problem, upper = Ridge(), {"log_weight": vector(5, 10)}
    weights = upper["log_weight"].exp()
    hessian = problem.X.T @ problem.X / 12 + torch.diag(weights)
    y = torch.linalg.solve(hessian, problem.X.T @ problem.target / 12)
    v = problem.X_val.T @ (problem.X_val @ y - problem.target_val) / 8
    expected = -weights * y * torch.linalg.solve(hessian, v)
    lower = {"y": torch.zeros(5, dtype=torch.float64)}
    update = SGDUpdate(1.0 / float(torch.linalg.eigvalsh(hessian).max()))
    result = unroll(problem, upper, lower, update, upper_batch=None, lower_batches=[None] * 400)
    assert relative_error(result.grad["log_weight"], expected) <= 1e-8


@pytest.mark.parametrize("name", PROCEDURES)
@pytest.mark.parametrize("truncation", [None, 1, 3])
def test_recomputed_equals_stored_bit_for_bit(name: str, truncation: int | None) -> None:
    problem, upper, lower = smooth()
    stored, recomputed = (
        unroll(problem, upper, lower, PROCEDURES[name][0], steps=truncation, recompute=again) for again in (False, True)
    )
    assert stored.lower is not None
    assert recomputed.lower is not None
    for one, other in ((stored.grad, recomputed.grad), (stored.lower, recomputed.lower)):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert stored.stationarity == recomputed.stationarity


@BOTH
@pytest.mark.parametrize("truncation", [1, 2, 4, 6, 9])
def test_truncation_differentiates_the_last_steps(truncation: int, recompute: bool) -> None:
    problem, upper, lower = smooth()
    x = {key: leaf.clone().requires_grad_() for key, leaf in upper.items()}
    y = {key: leaf.clone().requires_grad_() for key, leaf in lower.items()}
    velocity = {name: torch.zeros_like(leaf) for name, leaf in y.items()}
    for step, batch in enumerate(BATCHES):
        if step == len(BATCHES) - truncation:
            y = {name: leaf.detach().requires_grad_() for name, leaf in y.items()}
            velocity = {name: leaf.detach() for name, leaf in velocity.items()}
        g = torch.autograd.grad(problem.total(x, y, batch), list(y.values()), create_graph=True)
        velocity = {name: 0.8 * velocity[name] + slope for name, slope in zip(y, g, strict=True)}
        y = {name: leaf - 0.1 * velocity[name] for name, leaf in y.items()}
    value = problem.upper_objective(x, y, UPPER_BATCH)
    expected = torch.autograd.grad(value, list(x.values()), allow_unused=True, materialize_grads=True)
    update = SGDUpdate(0.1, momentum=0.8)
    result = unroll(problem, upper, lower, update, steps=truncation, recompute=recompute)
    for found, reference in zip(result.grad.values(), expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-11, atol=1e-14)
    full = unroll(problem, upper, lower, update)
    assert (relative_error(joined(result.grad), joined(full.grad)) < 1e-12) == (truncation >= len(BATCHES))
    assert result.lower is not None
    assert full.lower is not None
    assert torch.equal(joined(result.lower), joined(full.lower))


def test_one_step_from_a_converged_point() -> None:
    problem, upper, lower = quadratic()
    result = unroll(problem, upper, lower, SGDUpdate(0.3), upper_batch=None, lower_batches=[1.0])
    v = joined(lower) - problem.t
    torch.testing.assert_close(joined(result.implicit), -0.3 * problem.C @ v, rtol=1e-13, atol=0.0)


def test_state_of_a_live_optimizer_is_taken_up() -> None:
    problem, upper, start = smooth()
    lower = {name: leaf.clone().requires_grad_() for name, leaf in start.items()}
    optimizer = torch.optim.SGD(list(lower.values()), lr=0.1, momentum=0.8, weight_decay=0.05, nesterov=True)
    for batch in BATCHES[:4]:
        optimizer.zero_grad()
        problem.total(upper, lower, batch).backward()
        optimizer.step()
    optimizer.zero_grad()
    update, state = from_optimizer(optimizer, lower)
    result = unroll(problem, upper, lower, update, state=state, lower_batches=BATCHES[4:])
    whole = unroll(problem, upper, start, update, steps=2)
    torch.testing.assert_close(joined(result.grad), joined(whole.grad), rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="AdamUpdate keeps for these variables"):
        unroll(problem, upper, lower, AdamUpdate(0.1), state=state)


def test_start_that_was_copied_from_upper_variables() -> None:
    """MAML: y_0 = x."""

    class Task(Problem):
        def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
            return torch.cosh(batch @ lower["w"]).mean() + lower["b"] ** 4

        def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
            return (batch @ lower["w"]).sin().mean() + lower["b"].cos()

    x = {"initial": vector(3, 13), "b": vector(1, 14)[0]}
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in x.items()}
    w, b = leaves["initial"], leaves["b"]
    for batch in BATCHES:
        g = torch.autograd.grad(torch.cosh(batch @ w).mean() + b**4, [w, b], create_graph=True)
        w, b = w - 0.1 * g[0], b - 0.1 * g[1]
    expected = torch.autograd.grad((UPPER_BATCH @ w).sin().mean() + b.cos(), list(leaves.values()))
    lower = {"b": x["b"].clone(), "w": x["initial"].clone()}
    for recompute in (False, True):
        result = unroll(Task(), x, lower, SGDUpdate(0.1), started_from={"w": "initial", "b": "b"}, recompute=recompute)
        torch.testing.assert_close(tuple(result.grad.values()), expected, rtol=1e-12, atol=0.0)
    with pytest.raises(ValueError, match="no objective, neither upper nor lower, reaches any of the upper variables"):
        unroll(Task(), x, lower, SGDUpdate(0.1))
    for pairs in ({"w": "b"}, {"none": "b"}, {"w": "none"}):
        with pytest.raises(ValueError, match="started_from"):
            unroll(Task(), x, lower, SGDUpdate(0.1), started_from=pairs)
    with pytest.raises(ValueError, match="leave `steps` out"):
        unroll(Task(), x, lower, SGDUpdate(0.1), started_from={"b": "b"}, steps=2)


@BOTH
def test_variables_that_do_not_respond_move_but_are_not_differentiated(recompute: bool) -> None:
    problem, upper, lower = smooth()
    x = {key: leaf.clone().requires_grad_() for key, leaf in upper.items()}
    y = {key: leaf.clone().requires_grad_() for key, leaf in lower.items()}
    for batch in BATCHES:
        g = torch.autograd.grad(problem.total(x, y, batch), list(y.values()), create_graph=True)
        y = {"w": y["w"] - 0.1 * g[0], "v": (y["v"] - 0.1 * g[1]).detach().requires_grad_()}
    value = problem.upper_objective(x, {"w": y["w"], "v": y["v"].detach()}, UPPER_BATCH)
    expected = torch.autograd.grad(value, list(x.values()), allow_unused=True, materialize_grads=True)
    result = unroll(problem, upper, lower, SGDUpdate(0.1), implicit=["w"], recompute=recompute)
    torch.testing.assert_close(tuple(result.grad.values()), expected, rtol=1e-11, atol=1e-14)
    assert result.lower is not None
    torch.testing.assert_close(joined(result.lower), joined(y).detach(), rtol=1e-12, atol=0.0)


@BOTH
@pytest.mark.parametrize("update", [SGDUpdate(0.1, 0.9), AdamUpdate(0.1), TorchUpdate(torch.optim.Adagrad)], ids=str)
def test_variables_that_nothing_uses_get_zeros(update: Update, recompute: bool) -> None:
    _, upper, lower = quadratic()

    class Sparse(Quadratic):
        def lower_objective(self, upper: Params, lower: Params, batch: float) -> Tensor:
            used = {name: lower[name] for name in ("head", "body", "tail")}
            return super().lower_objective({name: upper[name] for name in ("x", "scale")}, used, batch)

        def upper_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
            return (lower["head"] - 1.0) ** 2

    options: dict[str, Any] = {"upper_batch": None, "lower_batches": [1.0, 1.2, 0.9], "recompute": recompute}
    more = {**lower, "spare": vector(3), "none": vector(0)}
    result = unroll(Sparse(), {**upper, "idle": vector(2)}, more, update, **options)
    reference = unroll(Sparse(), upper, lower, update, **options)
    assert not result.grad["idle"].any()
    assert torch.equal(result.grad["x"], reference.grad["x"])
    assert not joined(result.direct).any()
    assert result.lower is not None
    assert torch.equal(result.lower["spare"], more["spare"])
