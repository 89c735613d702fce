"""The policy of a random view and draws from it, against torchvision's draws and closed-form distributions."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from recipes.vision.views.crops import boxes
from recipes.vision.views.view_policy import ViewPolicy, draw


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def policy_of(**fields: Any) -> ViewPolicy:
    return ViewPolicy.model_validate(fields)


def p_value(result: Any) -> float:
    return float(result.pvalue)


@pytest.mark.parametrize(
    ("scale", "ratio", "height", "width"),
    [((0.5, 1.0), (3 / 4, 4 / 3), 240, 240), ((0.08, 1.0), (0.5, 1.0), 200, 300), ((0.3, 0.9), (0.5, 2.0), 120, 300)],
)
def test_crops_are_distributed_as_random_resized_crop(scale: Any, ratio: Any, height: int, width: int) -> None:
    count = 3000
    policy = ViewPolicy(size=8, crop_scale=scale, crop_ratio=ratio)
    drawn = draw(policy, count, generator(5))
    ours = boxes(drawn.area, drawn.aspect, drawn.place, ratio, height, width)
    torch.manual_seed(6)
    blank = torch.empty(3, height, width)
    theirs = torch.tensor([RandomResizedCrop.get_params(blank, list(scale), list(ratio)) for _ in range(count)]).T
    top, left, crop_height, crop_width = theirs
    for ours_, theirs_ in [
        (ours.height * ours.width, crop_height * crop_width),
        (ours.width / ours.height, crop_width / crop_height),
        (ours.top / (height - ours.height + 1), top / (height - crop_height + 1)),
        (ours.left / (width - ours.width + 1), left / (width - crop_width + 1)),
    ]:
        assert p_value(stats.ks_2samp(ours_.numpy(), theirs_.numpy())) > 1e-3
    assert ((ours.top >= 0) & (ours.left >= 0)).all()
    assert ((ours.top + ours.height <= height) & (ours.left + ours.width <= width)).all()


@pytest.mark.parametrize(("height", "width"), [(20, 100), (100, 20), (30, 30)])
def test_crop_that_never_fits_is_torchvisions_central_one(height: int, width: int) -> None:
    ratio = (0.9, 1.1) if height != width else (3.0, 4.0)
    policy = ViewPolicy(size=8, crop_scale=(0.9, 1.0), crop_ratio=ratio)
    drawn = draw(policy, 50, generator())
    ours = boxes(drawn.area, drawn.aspect, drawn.place, ratio, height, width)
    theirs = RandomResizedCrop.get_params(torch.empty(3, height, width), [0.9, 1.0], list(ratio))
    for row in zip(ours.top, ours.left, ours.height, ours.width, strict=True):
        assert tuple(int(value) for value in row) == theirs


def test_continuous_values_are_uniform_over_their_ranges() -> None:
    policy = ViewPolicy(size=32, contrast=1.5, rotation=30, translation=0.2, zoom=(0.5, 2.0), blur_sigma=(0.1, 2.0))
    drawn = draw(policy, 5000, generator(8))
    ranges = [
        (drawn.brightness, 0.6, 1.4),
        (drawn.contrast, 0.0, 2.5),
        (drawn.saturation, 0.8, 1.2),
        (drawn.hue, -0.1, 0.1),
        (drawn.angle, -30, 30),
        (drawn.translate[:, 0], -0.2, 0.2),
        (drawn.translate[:, 1], -0.2, 0.2),
        (drawn.zoom, 0.5, 2.0),
        (drawn.sigma, 0.1, 2.0),
    ]
    for values, low, high in ranges:
        assert p_value(stats.ks_1samp(values.numpy(), stats.uniform(low, high - low).cdf)) > 1e-3
    for (first, *_), (second, *_) in itertools.combinations(ranges, 2):
        assert abs(np.corrcoef(first.numpy(), second.numpy())[0, 1]) < 0.06


def test_order_is_uniform_over_all_permutations() -> None:
    orders = draw(ViewPolicy(size=32), 12000, generator(9)).order
    seen, counts = np.unique(orders.numpy(), axis=0, return_counts=True)
    assert {tuple(row) for row in seen.tolist()} == set(itertools.permutations(range(4)))
    assert stats.chisquare(counts).pvalue > 1e-3


def test_rates_of_the_operations() -> None:
    policy = ViewPolicy(
        size=32,
        flip_probability=0.5,
        jitter_probability=0.8,
        grey_probability=0.2,
        blur_probability=0.1,
        solarize_probability=0.3,
    )
    drawn = draw(policy, 10000, generator(10))
    for name, expected in [("flip", 0.5), ("jitter", 0.8), ("grey", 0.2), ("blur", 0.1), ("solarize", 0.3)]:
        hits = int(getattr(drawn, name).sum())
        assert stats.binomtest(hits, 10000, expected).pvalue > 1e-3, name
    always = draw(policy.model_copy(update=dict(flip_probability=1.0, blur_probability=0.0)), 200, generator())
    assert always.flip.all()
    assert not always.blur.any()


def test_every_sample_has_its_own_parameters() -> None:
    drawn = draw(ViewPolicy(size=32, rotation=10, translation=0.1, zoom=(0.5, 2)), 64, generator())
    for name in ("brightness", "contrast", "saturation", "hue", "sigma", "angle", "zoom"):
        assert len(getattr(drawn, name).unique()) == 64, name
    assert len(drawn.order.unique(dim=0)) > 15
    assert len(torch.cat((drawn.area, drawn.aspect, drawn.place), dim=1).unique(dim=0)) == 64


@pytest.mark.parametrize(("size", "kernel"), [(8, 3), (32, 3), (96, 9), (224, 23)])
def test_blur_kernel_is_a_tenth_of_the_side(size: int, kernel: int) -> None:
    assert ViewPolicy(size=size).kernel_size == kernel
    assert ViewPolicy(size=size, blur_kernel=5).kernel_size == 5


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (dict(size=0), "size"),
        (dict(crop_scale=(0.5, 1.2)), "crop_scale"),
        (dict(crop_scale=(0.9, 0.5)), "crop_scale"),
        (dict(crop_scale=(0.0, 0.5)), "crop_scale"),
        (dict(crop_ratio=(-1.0, 1.0)), "crop_ratio"),
        (dict(crop_ratio=(1.0, float("inf"))), "crop_ratio"),
        (dict(interpolation="nearest"), "interpolation"),
        (dict(flip_probability=1.5), "flip_probability"),
        (dict(grey_probability=float("nan")), "grey_probability"),
        (dict(brightness=-0.1), "brightness"),
        (dict(hue=0.6), "hue"),
        (dict(blur_sigma=(0.0, 1.0)), "blur_sigma"),
        (dict(blur_kernel=4), "blur_kernel"),
        (dict(blur_kernel=65, blur_probability=0.1), "kernel of 65 px"),
        (dict(zoom=(1.0, 0.5)), "zoom"),
        (dict(rotation=181), "rotation"),
        (dict(std=(1, 1, 0)), "std"),
        (dict(jitter=1), "jitter"),
    ],
)
def test_policy_refuses_bad_values_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        policy_of(**(dict(size=32) | fields))


def test_policy_is_frozen_and_every_field_is_described() -> None:
    policy = ViewPolicy(size=32)
    with pytest.raises(ValidationError):
        policy.size = 16  # pyright: ignore
    assert all(field.description for field in ViewPolicy.model_fields.values())


def test_crop_in_words_tells_area_from_aspect() -> None:
    text = ViewPolicy(size=96).describe_crop()
    code = ViewPolicy(size=96, crop_scale=(0.08, 1.0), crop_ratio=(0.5, 1.0)).describe_crop()
    assert "0.5 to 1 of the image's area" in text
    assert "width / height 0.75 to 1.33" in text
    assert "0.08 to 1 of the image's area" in code
    assert "width / height 0.5 to 1" in code
    assert "no crop" in ViewPolicy(size=8, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0)).describe_crop()
