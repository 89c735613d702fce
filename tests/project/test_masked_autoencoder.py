"""The masked autoencoder of examples/: what is hidden, what counts, and that it is a pretext task in every pass."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bilevel import linearize
from bilevel.nn.functional import curvature_pass
from bilevel.products import ForwardOverReverse, HVPProvider, ReverseOverReverse
from examples.masked_autoencoder import MaskedAutoencoder
from recipes.bissl.tasks.classification import Classification
from recipes.bissl.training.problem import BiSSLProblem
from recipes.vision.shards import SharedTransform
from recipes.vision.views.crops import boxes
from recipes.vision.views.view_policy import draw
from tests.support.cases import vector
from tests.support.recipes.pretext_cases import (
    check_micro_batches,
    check_products,
    check_same_runs,
    direction,
    run_stages,
)
from tests.support.recipes.random_view import RandomView

NAMED = "--pretext.task=examples.masked_autoencoder:MaskedAutoencoder", "--bissl.lower-lr=0.01", "--pretext.lr=0.01"


def make_task(**options: Any) -> MaskedAutoencoder:
    return MaskedAutoencoder.model_validate({"image_size": 8, "patch_size": 2, "decoder_width": 4, **options})


def photographs(count: int = 5, side: int = 8, channels: int = 3) -> Tensor:
    return torch.randint(256, (count, channels, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def batch_of(task: MaskedAutoencoder, seed: int = 1, channels: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    views = tuple(RandomView(view)(photographs(channels=channels), generator) for view in task.random_views())
    return SharedTransform(task.transform, "masked autoencoder")(5, views, generator)


class Map(nn.Module):
    """tanh(BatchNorm(convolution)) at half the resolution."""

    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Tanh())

    def forward(self, x: Tensor, feature_map: bool = False) -> Tensor:
        return self.body(x) if feature_map else self.body(x).mean(dim=(2, 3))


def make_problem(task: MaskedAutoencoder) -> tuple[BiSSLProblem, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    downstream = Classification.model_validate({"image_size": 8, "classes": ("a", "b")})
    lower, upper = Map().double(), Map().double()
    heads, head = task.build(lower).double(), downstream.build(upper).double()
    images, places = batch_of(task)
    return BiSSLProblem(task, downstream, lower, upper, heads, head, regularization_weight=0.5), (
        images.double(),
        places,
    )


@pytest.mark.parametrize(("ratio", "hidden"), [(0.75, 12), (0.5, 8), (0.01, 1), (0.99, 15)])
def test_masks_hide_a_share_of_the_patches_each_at_random(ratio: float, hidden: int) -> None:
    images, places = batch_of(make_task(mask_ratio=ratio))
    np.testing.assert_allclose(images.numpy(), photographs().numpy() / 127.5 - 1.0, atol=1e-6)
    assert places.shape == (5, hidden)
    assert all(len(set(row)) == hidden and set(row) <= set(range(16)) for row in places.tolist())
    if hidden == 12:
        assert len({tuple(sorted(row)) for row in places.tolist()}) == 5


def test_a_share_of_a_batch_hides_what_the_whole_batch_does() -> None:
    task, whole = make_task(), batch_of(make_task())
    for rows in (slice(0, 2), slice(2, 5)):
        generator = torch.Generator().manual_seed(1)
        views = RandomView(task.random_views()[0])(photographs(), generator)
        images, places = task.transform((views[rows],), generator, rows=rows, count=5)
        assert torch.equal(images, whole[0][rows])
        assert torch.equal(places, whole[1][rows])


def test_crops_are_squares_of_at_least_the_given_share() -> None:
    (view,) = make_task(smallest_crop=0.25).random_views()
    drawn = draw(view, 200, torch.Generator().manual_seed(0))
    found = boxes(drawn.area, drawn.aspect, drawn.place, view.crop_ratio, 40, 40)
    assert torch.equal(found.height, found.width)
    assert 20 <= int(found.height.min()) < 24 < 36 < int(found.height.max()) <= 40
    assert make_task(smallest_crop=0.25).describe_views() == [
        "pretext view 1: random crop of 0.25 to 1 of the image's area, width / height 1 to 1, resized to 8 px"
    ]


def test_grey_images_become_three_channels() -> None:
    images, _ = batch_of(make_task(), channels=1)
    assert images.shape == (5, 3, 8, 8)
    assert torch.equal(images[:, 0], images[:, 2])


@pytest.mark.parametrize("learned", [True, False])
def test_the_encoder_sees_the_token_in_hidden_places_and_the_image_elsewhere(learned: bool) -> None:
    task, seen = make_task(learned_token=learned), []
    heads = task.build(Map())
    with torch.no_grad():
        heads["token"].get_parameter("patch").add_(torch.arange(12.0).view(3, 2, 2) if learned else 0.0)
    assert heads["token"].get_parameter("patch").requires_grad == learned
    images, places = batch_of(task)

    def backbone(x: Tensor, feature_map: bool) -> Tensor:
        assert feature_map
        seen.append(x.detach().numpy())
        return torch.zeros(5, 4, 4, 4)

    task.loss(backbone, dict(heads.items()), (images, places))
    token = heads["token"].get_parameter("patch").detach().numpy()
    for i in range(5):
        for place in range(16):
            y, x = 2 * (place // 4), 2 * (place % 4)
            expected = token if place in places[i] else images[i, :, y : y + 2, x : x + 2].numpy()
            np.testing.assert_array_equal(seen[0][i, :, y : y + 2, x : x + 2], expected)


@pytest.mark.parametrize("normalise", [False, True])
def test_loss_and_gradient_are_those_of_the_hidden_patches_alone(normalise: bool) -> None:
    task = make_task(normalise=normalise)
    images, places = batch_of(task)
    found = vector(5 * 12 * 16, 3).float().view(5, 12, 4, 4).requires_grad_()
    heads = {"token": lambda x, hidden: x, "decoder": lambda features: found}
    loss = task.loss(lambda x, feature_map: x, heads, (images, places))
    loss.backward()
    errors, gradient = [], np.zeros((5, 12, 4, 4))
    for i in range(5):
        for place in places[i].tolist():
            y, x = place // 4, place % 4
            wanted = images[i, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].double().numpy().reshape(-1)
            if normalise:
                wanted = (wanted - wanted.mean()) / np.sqrt(wanted.var(ddof=1) + 1e-6)
            error = found[i, :, y, x].detach().double().numpy() - wanted
            errors.append(error**2)
            gradient[i, :, y, x] = 2 * error / (5 * 12 * 12)
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-5)
    assert found.grad is not None
    np.testing.assert_allclose(found.grad.numpy(), gradient, atol=1e-6)
    assert (found.grad != 0).any(dim=1).sum() == places.numel()


def test_masks_are_fixed_within_a_solve() -> None:
    problem, batch = make_problem(make_task())
    upper, lower = problem.variables()
    with curvature_pass():
        assert torch.equal(problem.lower_objective(upper, lower, batch), problem.lower_objective(upper, lower, batch))
    system = linearize(problem, upper, lower, [batch])
    w = direction(system.variables(lower))
    first, second = system.operator(w), system.operator(w)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = linearize(problem, upper, lower, [(batch[0], batch_of(make_task(), 2)[1])]).operator(w)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("hvp", [ReverseOverReverse(), ForwardOverReverse()], ids=["reverse", "forward"])
@pytest.mark.parametrize("options", [{}, {"normalise": True, "learned_token": False}], ids=["plain", "normalised"])
def test_products_equal_central_differences(hvp: HVPProvider, options: dict[str, Any]) -> None:
    problem, batch = make_problem(make_task(**options))
    assert ("heads.token.patch" in problem.variables()[1]) == (not options)
    check_products(problem, batch, hvp)


def test_products_in_micro_batches() -> None:
    check_micro_batches(*make_problem(make_task()))


def test_optimizer_is_its_own() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = make_task().optimizer(iter([weight]), 0.1, 0.5)
    weight.grad = torch.tensor([3.0, -0.2])
    optimizer.step()
    # AdamW's first step: decay by lr * wd, then lr in the sign's direction.
    np.testing.assert_allclose(weight.detach().numpy(), [0.95 - 0.1, 0.95 + 0.1], rtol=1e-5)


def test_patches_must_divide_the_image() -> None:
    for side in (3, 8):
        with pytest.raises(ValueError, match="patch_size must divide image_size=8"):
            make_task(patch_size=side)


def test_all_stages_and_an_exact_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_stages(tmp_path / "whole", monkeypatch, *NAMED)
    assert "heads.token.patch" in whole["bissl"]
    assert whole["bissl"]["heads.token.patch"].abs().sum() > 0
    check_same_runs(run_stages(tmp_path / "again", monkeypatch, *NAMED, interrupted=True), whole)
