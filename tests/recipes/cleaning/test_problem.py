"""The bilevel problem of the weights: its lower solution and its hypergradient against dense algebra."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bilevel import CG, Hypergradient, Implicit, Params, Status, hypergradient, ridge, tree
from bilevel.products import GaussNewton, HVPProvider, ReverseOverReverse
from recipes.cleaning.problem import WeightedSamples, sample_weights
from recipes.vision.frozen.classifier import Classifier

RIDGE, CLASSES = 0.05, 3
LINEAR, NETWORK = Classifier(4, CLASSES), Classifier(4, CLASSES, hidden=5)


def drawn(count: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    t = torch.randint(CLASSES, (count,), generator=generator)
    z = torch.randn(count, 4, generator=generator, dtype=dtype)
    return z + torch.nn.functional.one_hot(t, 4), t


def newton(z: Tensor, t: Tensor, weights: Tensor) -> Tensor:
    """The lower solution as one vector (w, then b), to rounding."""
    y = torch.zeros(5 * CLASSES, dtype=z.dtype)
    for _ in range(30):
        gradient = torch.func.grad(lower)(y, z, t, weights)
        y = y - torch.linalg.solve(torch.func.hessian(lower)(y, z, t, weights), gradient)
    return y


def lower(y: Tensor, z: Tensor, t: Tensor, weights: Tensor) -> Tensor:
    w, b = y[:-CLASSES].view(4, CLASSES), y[-CLASSES:]
    fit = (weights * cross_entropy(z @ w + b, t, reduction="none")).mean()
    return fit + 0.5 * RIDGE * y.square().sum()


def test_the_lower_level_is_solved() -> None:
    z, t = drawn(40, 0, torch.float32)
    weights = torch.rand(40, generator=torch.Generator().manual_seed(1))
    model = LINEAR.solved(z, t, weights, RIDGE)
    found = torch.cat([model["w"].flatten(), model["b"]]).double()
    assert (found - newton(z.double(), t, weights.double())).abs().max() < 1e-3


def test_the_hypergradient_is_that_of_differences_through_the_solution() -> None:
    samples, trusted = drawn(20, 0), drawn(9, 1)
    logits = torch.randn(20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def upper(s: Tensor) -> Tensor:
        y = newton(*samples, 2.0 * s.sigmoid())
        return cross_entropy(trusted[0] @ y[:-CLASSES].view(4, CLASSES) + y[-CLASSES:], trusted[1])

    y = newton(*samples, 2.0 * logits.sigmoid())
    model = {"w": y[:-CLASSES].view(4, CLASSES).clone(), "b": y[-CLASSES:].clone()}
    batch = (*samples, torch.arange(20))
    result = hypergradient(
        WeightedSamples(LINEAR, RIDGE),
        {"logits": logits},
        model,
        CG(60, 1e-12),
        upper_batch=trusted,
        lower_batches=[batch],
    )
    step = 1e-5
    for place in (0, 7, 19):
        unit = torch.zeros_like(logits)
        unit[place] = step
        expected = (upper(logits + unit) - upper(logits - unit)) / (2 * step)
        assert float(result.grad["logits"][place]) == pytest.approx(float(expected), rel=1e-5, abs=1e-9)


def test_a_batch_of_some_samples_takes_their_weights() -> None:
    z, t = drawn(6, 0)
    upper = {"logits": torch.arange(6, dtype=torch.float64)}
    model = {"w": torch.ones(4, CLASSES, dtype=torch.float64), "b": torch.zeros(CLASSES, dtype=torch.float64)}
    places = torch.tensor([4, 1])
    expected = (sample_weights(upper)[places] * LINEAR.losses(model, z[places], t[places])).mean()
    assert WeightedSamples(LINEAR, RIDGE).lower_objective(upper, model, (z[places], t[places], places)) == expected


def test_weights_of_samples_start_at_one_and_stay_below_two() -> None:
    assert sample_weights({"logits": torch.tensor([0.0, 100.0, -100.0])}).tolist() == [1.0, 2.0, 0.0]


def test_the_lower_level_starts_at_its_solution_where_samples_are_given() -> None:
    z, t = drawn(30, 3, torch.float32)
    upper = {"logits": torch.zeros(30)}
    began = WeightedSamples(LINEAR, RIDGE, (z, t, torch.arange(30))).reset_lower(upper)
    assert began is not None
    assert torch.equal(began["w"], LINEAR.solved(z, t, torch.ones(30), RIDGE)["w"])
    assert WeightedSamples(LINEAR, RIDGE).reset_lower(upper) is None


def of_network(logits: Tensor, ridge: float) -> tuple[WeightedSamples, Params, Any]:
    """The problem, its lower solution for these logits, and all samples."""
    z, t = drawn(len(logits), 0)
    model = NETWORK.solved(z, t, sample_weights({"logits": logits}), ridge)
    return WeightedSamples(NETWORK, ridge), model, (z, t, torch.arange(len(t)))


def test_a_network_below_has_the_hypergradient_of_differences_through_its_solution() -> None:
    """By exact products, whose solution is that of the implicit function theorem at a strict minimiser."""
    trusted, logits = drawn(9, 1), torch.zeros(20, dtype=torch.float64)
    problem, start, batch = of_network(logits, RIDGE)

    def polished(s: Tensor) -> Params:
        """The minimiser near `start`, to rounding, by Newton steps on the dense Hessian."""
        upper = {"logits": s}

        def value(y: Tensor) -> Tensor:
            lower = tree.unflatten(y, start)
            return problem.lower_objective(upper, lower, batch) + RIDGE * ridge(lower)

        y = tree.flatten(start)
        for _ in range(12):
            y = y - torch.linalg.solve(torch.func.hessian(value)(y), torch.func.grad(value)(y))
        assert torch.linalg.eigvalsh(torch.func.hessian(value)(y))[0] > 0
        assert torch.func.grad(value)(y).abs().max() < 1e-12
        return tree.unflatten(y, start)

    given = {"upper_batch": trusted, "lower_batches": [batch]}
    result = hypergradient(problem, {"logits": logits}, polished(logits), CG(200, 1e-12), **given)
    step = 1e-5
    for place in (0, 7, 19):
        unit = torch.zeros_like(logits)
        unit[place] = step
        after, before = (NETWORK.losses(polished(s), *trusted).mean() for s in (logits + unit, logits - unit))
        expected = float(after - before) / (2 * step)
        assert float(result.grad["logits"][place]) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_a_network_is_solved_by_a_positive_definite_matrix_where_its_hessian_is_not() -> None:
    logits = torch.zeros(20, dtype=torch.float64)
    problem, model, batch = of_network(logits, 1e-4)
    # Away from the solution, where outputs and labels disagree.
    away = {name: leaf + 0.5 * torch.arange(leaf.numel()).double().sin().view_as(leaf) for name, leaf in model.items()}

    def found(problem: WeightedSamples, lower: Params, hvp: HVPProvider) -> Hypergradient:
        method = Implicit(CG(200, 1e-10), hvp=hvp)
        given = {"upper_batch": drawn(9, 1), "lower_batches": [batch]}
        return hypergradient(problem, {"logits": logits}, lower, method, on_failure="ignore", **given)

    exact, gauss = (found(problem, away, hvp) for hvp in (ReverseOverReverse(), GaussNewton()))
    assert exact.solution is not None
    assert exact.solution.status is Status.NEGATIVE_CURVATURE
    assert gauss.solution is not None
    assert gauss.solution.status is Status.CONVERGED
    # The two agree where the outputs are linear in the model.
    linear = {"w": away["w"][:4], "b": away["b"]}
    exact, gauss = (found(WeightedSamples(LINEAR, RIDGE), linear, hvp) for hvp in (ReverseOverReverse(), GaussNewton()))
    assert torch.allclose(exact.grad["logits"], gauss.grad["logits"], rtol=1e-6)
