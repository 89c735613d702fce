"""Views of a whole batch at once, against torchvision sample by sample, and the draws behind them, against its draws.

Both read the parameters that `draw` gives, so that one set of tests fixes the distribution and another the pixels.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms import ColorJitter, GaussianBlur, RandomResizedCrop

from recipes.vision.views.batched_views import cpu_chunk, views_of_crops, views_of_pictures
from recipes.vision.views.crops import boxes
from recipes.vision.views.view_policy import ViewParameters, ViewPolicy, draw
from tests.support.recipes.random_view import RandomView
from tests.support.recipes.view_reference import PLAIN, generator, photographs, policy_of, reference_views

PROMISED = 2 / 255
"""The contract, in units of the range before mean and std."""
REACHED = 5e-5
"""What float32 resampling, blur and colour changes really differ by; 3e-6 where it was measured."""
COUNT = 40

CROP: dict[str, Any] = dict(crop_scale=(0.2, 1.0), crop_ratio=(0.5, 2.0))
STILL: dict[str, Any] = dict(brightness=0, contrast=0, saturation=0, hue=0, jitter_probability=1)
ALONE: dict[str, dict[str, Any]] = {
    "bicubic": CROP,
    "bilinear": CROP | dict(interpolation="bilinear"),
    "flip": dict(flip_probability=0.5),
    "move": dict(rotation=60, translation=0.3, zoom=(0.5, 2.0)),
    "brightness": STILL | dict(brightness=1.5),
    "contrast": STILL | dict(contrast=1.5),
    "saturation": STILL | dict(saturation=1.5),
    "hue": STILL | dict(hue=0.5),
    "grey": dict(grey_probability=0.5),
    "blur": dict(blur_probability=0.7, blur_sigma=(0.05, 8.0), blur_kernel=9),
    "solarize": dict(solarize_probability=0.5),
}
EVERYTHING: dict[str, Any] = dict(
    jitter_probability=0.8,
    brightness=0.8,
    contrast=0.8,
    saturation=0.8,
    hue=0.5,
    flip_probability=0.5,
    grey_probability=0.2,
    blur_probability=0.5,
    blur_kernel=5,
    solarize_probability=0.4,
)


def noise(count: int, height: int, width: int, channels: int = 3, seed: int = 1) -> Tensor:
    """The roughest images: independent pixels, among them many black and white ones."""
    values = torch.randint(-60, 316, (count, channels, height, width), generator=generator(seed))
    return values.clamp(0, 255).to(torch.uint8)


def errors(policy: ViewPolicy, images: Tensor, parameters: ViewParameters) -> Tensor:
    """Distance of every pixel from torchvision's, [N, 3, size, size], in units of the range."""
    return (views_of_pictures(policy, images, parameters) - reference_views(policy, images, parameters)).abs()


def assert_equal_views(errors: Tensor, solarized: bool) -> None:
    """At a pixel that rounding moves across the threshold of solarisation both sides are right, 1/255 apart."""
    assert errors.max() <= (PROMISED if solarized else REACHED)
    assert (errors > REACHED).float().mean() < 1e-3


@pytest.mark.parametrize(("height", "width", "size"), [(96, 64, 24), (20, 26, 32), (24, 24, 24)])
@pytest.mark.parametrize("operation", ALONE)
def test_each_operation_alone_equals_torchvisions(operation: str, height: int, width: int, size: int) -> None:
    policy = policy_of(**PLAIN | dict(size=size) | ALONE[operation])
    images = torch.cat((photographs(COUNT // 2, height, width), noise(COUNT // 2, height, width)))
    parameters = draw(policy, COUNT, generator(2))
    assert_equal_views(errors(policy, images, parameters), operation == "solarize")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("moved", [False, True])
def test_all_operations_together_equal_torchvisions(channels: int, interpolation: str, moved: bool) -> None:
    geometry = CROP | dict(size=24, interpolation=interpolation) | (ALONE["move"] if moved else {})
    policy = policy_of(**PLAIN | geometry | EVERYTHING)
    images = torch.cat((photographs(60, 40, 52, channels), noise(20, 40, 52, channels)))
    parameters = draw(policy, 80, generator(3))
    assert len(parameters.order.unique(dim=0)) > 15
    assert_equal_views(errors(policy, images, parameters), solarized=True)


@pytest.mark.parametrize("turn", [-0.5, 0.5, 0.25])
def test_hue_of_pure_colours_and_greys(turn: float) -> None:
    """Every corner of the colour cube, edges between them, and greys: where the hue's formula changes branch."""
    levels = torch.tensor([0, 1, 127, 128, 254, 255], dtype=torch.uint8)
    image = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 12, 18)
    policy = policy_of(**PLAIN | STILL | dict(size=12, hue=0.5))
    still = draw(policy, 1, generator())
    parameters = dataclasses.replace(still, hue=torch.tensor([turn]))
    for part in (image[..., :12], image[..., 6:]):
        assert errors(policy, part.contiguous(), parameters).max() < REACHED


@pytest.mark.parametrize(
    "field",
    ["area", "aspect", "place", "flip", "brightness", "contrast", "saturation", "hue", "order", "sigma", "blur"],
)
def test_one_samples_parameters_do_not_serve_another(field: str) -> None:
    """Values that belong to the neighbour, as of one draw for the batch, are found out in most samples."""
    policy = policy_of(**PLAIN | CROP | EVERYTHING | dict(size=24, jitter_probability=1, solarize_probability=0))
    images = noise(COUNT, 60, 60)
    parameters = draw(policy, COUNT, generator(4))
    small = dataclasses.replace(parameters, grey=torch.zeros(COUNT, dtype=torch.bool))
    values = getattr(small, field)
    other = values.roll(1, 0)
    rows = (values != other).view(COUNT, -1).any(dim=1)
    if field == "sigma":
        rows &= small.blur
    wrong = views_of_pictures(policy, images, dataclasses.replace(small, **{field: other}))
    worst = (wrong - reference_views(policy, images, small)).abs().amax(dim=(1, 2, 3))
    assert rows.sum() >= 10
    # Some orders differ by changes that commute.
    assert (worst[rows] > PROMISED).float().mean() > 0.5


def test_a_view_does_not_depend_on_its_batch() -> None:
    policy = policy_of(size=16, **EVERYTHING)
    chunk = cpu_chunk(16)
    images = photographs(2 * chunk + 5, 24, 20)
    parameters = draw(policy, len(images), generator())
    together = views_of_pictures(policy, images, parameters)
    for i in (0, chunk - 1, chunk, 2 * chunk + 4):
        alone = views_of_pictures(policy, images[i : i + 1], parameters[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)


def test_no_value_is_read_back_from_the_device() -> None:
    """Tensors on the meta device have no values: whatever made the host wait for a GPU would raise."""
    policy = policy_of(size=16, rotation=10, **EVERYTHING)
    images = torch.empty(50, 3, 24, 20, dtype=torch.uint8, device="meta")
    views = views_of_pictures(policy, images, draw(policy, 50, generator()))
    assert views.device.type == "meta"
    assert views.shape == (50, 3, 16, 16)
    assert RandomView(policy)(images, generator()).device.type == "meta"


def test_wrong_batches_are_refused() -> None:
    policy = ViewPolicy(size=8)
    parameters = draw(policy, 2, generator())
    for wrong in (torch.rand(2, 3, 8, 8), photographs(2, 8, 8)[0], photographs(2, 8, 8, channels=2)):
        with pytest.raises(ValueError, match="uint8"):
            views_of_pictures(policy, wrong, parameters)
    with pytest.raises(ValueError, match="2 views"):
        views_of_pictures(policy, photographs(3, 8, 8), parameters)
    for wrong in (torch.rand(2, 3, 8, 8), photographs(2, 8, 8, channels=2)):
        with pytest.raises(ValueError, match="uint8"):
            views_of_crops(policy, wrong, parameters)
    for wrong, rows in (
        (photographs(3, 8, 8), None),
        (photographs(2, 8, 9), None),
        (photographs(2, 8, 8), slice(1)),
        (photographs(1, 8, 8), slice(2, 3)),
    ):
        with pytest.raises(ValueError, match="of 8 px"):
            views_of_crops(policy, wrong, parameters, rows)


DRAWS = 4000
SIGNIFICANT = 1e-3
"""For each family of tests together: each of its m tests has to fall below the m-th part (Bonferroni)."""


def assert_no_difference(p_values: dict[str, float]) -> None:
    assert {name: p for name, p in p_values.items() if p < SIGNIFICANT / len(p_values)} == {}


def p_value(result: Any) -> float:
    return float(result.pvalue)


def test_every_parameter_has_its_stated_distribution() -> None:
    policy = ViewPolicy(
        size=96,
        crop_scale=(0.2, 0.5),
        brightness=0.4,
        contrast=1.5,
        hue=0.5,
        rotation=30,
        translation=0.2,
        zoom=(0.5, 2),
    )
    side = 4000
    drawn = draw(policy, DRAWS, generator(11))
    box = boxes(drawn.area, drawn.aspect, drawn.place, policy.crop_ratio, side, side)
    values: dict[str, tuple[Tensor, float, float]] = {
        # Boxes of half the area at most fit always, so that nothing is drawn again.
        "area": (box.height * box.width / side**2, 0.2, 0.5),
        "aspect": ((box.width / box.height).log(), math.log(3 / 4), math.log(4 / 3)),
        "top": (box.top / (side - box.height), 0, 1),
        "left": (box.left / (side - box.width), 0, 1),
        "brightness": (drawn.brightness, 0.6, 1.4),
        "contrast": (drawn.contrast, 0, 2.5),
        "saturation": (drawn.saturation, 0.8, 1.2),
        "hue": (drawn.hue, -0.5, 0.5),
        "angle": (drawn.angle, -30, 30),
        "right": (drawn.translate[:, 0], -0.2, 0.2),
        "down": (drawn.translate[:, 1], -0.2, 0.2),
        "zoom": (drawn.zoom, 0.5, 2),
        "sigma": (drawn.sigma, 0.1, 2),
    }
    assert_no_difference(
        {
            name: p_value(stats.ks_1samp(sample.double().numpy(), stats.uniform(low, high - low).cdf))
            for name, (sample, low, high) in values.items()
        }
    )
    assert_no_difference(
        {
            f"{one} and {two}": p_value(stats.spearmanr(values[one][0].numpy(), values[two][0].numpy()))
            for one, two in itertools.combinations(values, 2)
        }
    )


def test_draws_are_distributed_as_torchvisions() -> None:
    policy = ViewPolicy(size=96, crop_scale=(0.08, 1.0))
    drawn = draw(policy, DRAWS, generator(12))
    box = boxes(drawn.area, drawn.aspect, drawn.place, policy.crop_ratio, 96, 120)
    ours = {**vars(drawn), **vars(box)}
    torch.manual_seed(13)
    blank = torch.empty(3, 96, 120)
    their_boxes = [RandomResizedCrop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(DRAWS)]
    jitter = [
        ColorJitter.get_params((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1))  # pyright: ignore
        for _ in range(DRAWS)
    ]
    orders, *factors = zip(*jitter, strict=True)
    theirs: dict[str, Any] = dict(zip(("top", "left", "height", "width"), zip(*their_boxes, strict=True), strict=True))
    theirs |= dict(zip(("brightness", "contrast", "saturation", "hue"), factors, strict=True))
    theirs["sigma"] = [GaussianBlur.get_params(0.1, 2.0) for _ in range(DRAWS)]
    p_values = {
        name: p_value(stats.ks_2samp(ours[name].double().numpy(), np.array(sample, dtype=float)))
        for name, sample in theirs.items()
    }
    codes = [np.array(order) @ [64, 16, 4, 1] for order in (drawn.order.numpy(), torch.stack(orders).numpy())]
    table = [np.unique(code, return_counts=True)[1] for code in codes]
    p_values["order"] = p_value(stats.chi2_contingency(np.stack(table)))
    assert_no_difference(p_values)


def test_order_and_chances() -> None:
    policy = ViewPolicy(size=96, blur_probability=0.1, solarize_probability=0.2)
    drawn = draw(policy, 3 * DRAWS, generator(14))
    seen, counts = np.unique(drawn.order.numpy(), axis=0, return_counts=True)
    assert {tuple(row) for row in seen.tolist()} == set(itertools.permutations(range(4)))
    chances = {"flip": 0.5, "jitter": 0.8, "grey": 0.2, "blur": 0.1, "solarize": 0.2}
    p_values = {
        name: p_value(stats.binomtest(int(getattr(drawn, name).sum()), 3 * DRAWS, chance))
        for name, chance in chances.items()
    }
    for one, two in itertools.combinations(chances, 2):
        both = int((getattr(drawn, one) & getattr(drawn, two)).sum())
        p_values[f"{one} and {two}"] = p_value(stats.binomtest(both, 3 * DRAWS, chances[one] * chances[two]))
    assert_no_difference(p_values | {"order": float(stats.chisquare(counts).pvalue)})
