"""The classifier of frozen features: its scores, where a fit ends, the ridge it takes, and its curvature."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from bilevel import ridge, tree
from recipes.vision.frozen.classifier import RIDGES, Classifier

LINEAR, NETWORK = Classifier(4, 3), Classifier(4, 3, hidden=6, seed=2)


def drawn(count: int, seed: int = 0, wrong: float = 0.0) -> tuple[Tensor, Tensor]:
    """Features around a corner for each class, float64, and labels, of which a share is drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.randint(3, (count,), generator=generator)
    z = torch.randn(count, 4, generator=generator, dtype=torch.float64) + 2.0 * one_hot(t, 4)
    again = torch.rand(count, generator=generator) < wrong
    return z, torch.where(again, torch.randint(3, (count,), generator=generator), t)


def test_scores_of_a_network_are_those_of_a_hidden_layer() -> None:
    z, t = drawn(7)
    generator = torch.Generator().manual_seed(1)
    model = {
        name: torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for name, leaf in NETWORK.start(z).items()
    }
    for row, label, loss in zip(z, t, NETWORK.losses(model, z, t), strict=True):
        units = [math.tanh(float(row @ model["w0"][:, unit] + model["b0"][unit])) for unit in range(6)]
        scores = [
            sum(units[unit] * float(model["w"][unit, c]) for unit in range(6)) + float(model["b"][c]) for c in range(3)
        ]
        expected = math.log(sum(map(math.exp, scores))) - scores[int(label)]
        assert float(loss) == pytest.approx(expected)


def test_a_fit_begins_at_its_own_draw() -> None:
    z, _ = drawn(2)
    wide = Classifier(400, 3, hidden=50, seed=1)
    start = wide.start(z)
    assert float(start["w0"].std()) == pytest.approx(0.05, rel=0.05)
    assert torch.equal(start["w0"], wide.start(z)["w0"])
    assert not torch.equal(start["w0"], Classifier(400, 3, hidden=50, seed=2).start(z)["w0"])
    assert not any(leaf.any() for name, leaf in start.items() if name != "w0")
    assert set(LINEAR.start(z)) == {"w", "b"}


@pytest.mark.parametrize("model", [LINEAR, NETWORK], ids=["linear", "network"])
def test_a_fit_ends_where_nothing_is_left_to_gain(model: Classifier) -> None:
    z, t = drawn(60)
    weights = torch.linspace(0.0, 2.0, 60, dtype=torch.float64)
    found = {name: leaf.requires_grad_() for name, leaf in model.solved(z, t, weights, 0.05).items()}
    value = (weights * cross_entropy(model.scores(found, z), t, reduction="none")).mean() + 0.05 * ridge(found)
    gradient = tree.gradients(value, found)
    # L-BFGS also ends where a step changes next to nothing.
    assert max(float(leaf.abs().max()) for leaf in gradient.values()) < 1e-3
    assert float(value.detach()) < float((weights * math.log(3)).mean())


def test_a_network_tells_apart_what_no_linear_model_can() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200, 2, generator=generator)
    t = (z[:, 0] * z[:, 1] > 0).long()
    right = []
    for hidden in (0, 8):
        model = Classifier(2, 2, hidden)
        found = model.solved(z, t, torch.ones(200), 1e-3)
        right.append(float((model.scores(found, z).argmax(1) == t).double().mean()))
    assert right[0] < 0.75
    assert right[1] > 0.9


def test_the_ridge_grows_with_the_share_of_wrong_labels() -> None:
    """Of labels without any information the largest one is taken: nothing is lost by it."""
    unseen = drawn(300, 1)
    right, random = (LINEAR.chosen_ridge(drawn(60, 0, wrong), unseen) for wrong in (0.0, 1.0))
    assert right < random == max(RIDGES)


def test_the_curvature_of_a_linear_model_is_bounded_everywhere() -> None:
    z, t = drawn(50)
    bound = LINEAR.steepest(LINEAR.start(z), z, t, 2.0)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        y = torch.randn(15, generator=generator, dtype=torch.float64)

        def value(y: Tensor) -> Tensor:
            return 2.0 * cross_entropy(z @ y[:12].view(4, 3) + y[12:], t)

        assert float(torch.linalg.eigvalsh(torch.func.hessian(value)(y))[-1]) <= bound


def test_the_curvature_of_a_network_is_that_of_its_hessian() -> None:
    z, t = drawn(50)
    model = NETWORK.solved(z, t, torch.ones(50, dtype=torch.float64), 0.05)

    def value(y: Tensor) -> Tensor:
        return NETWORK.losses(tree.unflatten(y, model), z, t).mean()

    largest = float(torch.linalg.eigvalsh(torch.func.hessian(value)(tree.flatten(model)))[-1])
    assert NETWORK.steepest(model, z, t, 2.0) == pytest.approx(2.0 * largest, rel=0.02)
