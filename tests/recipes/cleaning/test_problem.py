"""The bilevel problem of the weights: its lower solution and its hypergradient against dense algebra."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bilevel import CG, hypergradient
from recipes.cleaning.problem import WeightedSamples, sample_weights
from recipes.vision.frozen.linear_model import losses, solved

RIDGE, CLASSES = 0.05, 3


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
    model = solved(z, t, weights, RIDGE, CLASSES)
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
        WeightedSamples(RIDGE), {"logits": logits}, model, CG(60, 1e-12), upper_batch=trusted, lower_batches=[batch]
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
    expected = (sample_weights(upper)[places] * losses(model, z[places], t[places])).mean()
    assert WeightedSamples(RIDGE).lower_objective(upper, model, (z[places], t[places], places)) == expected


def test_weights_of_samples_start_at_one_and_stay_below_two() -> None:
    assert sample_weights({"logits": torch.tensor([0.0, 100.0, -100.0])}).tolist() == [1.0, 2.0, 0.0]


def test_the_lower_level_starts_at_its_solution_where_samples_are_given() -> None:
    z, t = drawn(30, 3, torch.float32)
    upper = {"logits": torch.zeros(30)}
    began = WeightedSamples(RIDGE, (z, t, torch.arange(30)), CLASSES).reset_lower(upper)
    assert began is not None
    assert torch.equal(began["w"], solved(z, t, torch.ones(30), RIDGE, CLASSES)["w"])
    assert WeightedSamples(RIDGE).reset_lower(upper) is None
