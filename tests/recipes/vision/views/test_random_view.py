"""Random views, against torchvision's own functions and PIL's."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torchvision.transforms import functional as V1

from recipes.vision.views.batched_views import views_of_pictures
from recipes.vision.views.crops import box_of
from recipes.vision.views.view_policy import ViewParameters, ViewPolicy, draw
from tests.support.recipes.random_view import RandomView
from tests.support.recipes.view_reference import PLAIN, generator, photographs, policy_of, reference_views

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def repeated(parameters: ViewParameters, **changes: Any) -> ViewParameters:
    return dataclasses.replace(parameters, **changes)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_views_equal_torchvision_sample_by_sample(interpolation: Any) -> None:
    policy = ViewPolicy(
        size=32,
        interpolation=interpolation,
        rotation=20,
        translation=0.1,
        zoom=(0.8, 1.2),
        blur_probability=0.5,
        solarize_probability=0.5,
    )
    images = photographs(40, 36, 44)
    parameters = draw(policy, 40, generator())
    views = views_of_pictures(policy, images, parameters)
    expected = reference_views(policy, images, parameters)
    assert views.dtype == torch.float32
    assert views.shape == (40, 3, 32, 32)
    torch.testing.assert_close(views, expected, atol=2e-5, rtol=1e-5)
    assert torch.equal(RandomView(policy)(images, generator()), views)


@pytest.mark.parametrize(("height", "width", "size", "channels"), [(8, 8, 8, 1), (12, 12, 8, 3), (10, 14, 8, 1)])
def test_moved_views_equal_torchvision_sample_by_sample(height: int, width: int, size: int, channels: int) -> None:
    policy = ViewPolicy(
        size=size,
        crop_scale=(1, 1),
        crop_ratio=(1, 1),
        jitter_probability=0,
        grey_probability=0.3,
        solarize_probability=0.3,
        rotation=25,
        translation=0.2,
        zoom=(0.7, 1.4),
    )
    images = photographs(60, height, width, channels)
    parameters = draw(policy, 60, generator(3))
    expected = reference_views(policy, images, parameters)
    torch.testing.assert_close(views_of_pictures(policy, images, parameters), expected, atol=1e-4, rtol=1e-4)


def test_quarter_turn_is_clockwise_and_shift_moves_right_and_down() -> None:
    policy = policy_of(size=8, **PLAIN)
    images = photographs(3, 8, 8)
    still = draw(policy, 3, generator())
    turned = views_of_pictures(policy, images, repeated(still, angle=torch.full((3,), 90.0)))
    torch.testing.assert_close(turned, torch.rot90(images, -1, (2, 3)) / 255, atol=1e-5, rtol=0)
    moved = views_of_pictures(policy, images, repeated(still, translate=torch.tensor([[0.25, 0.125]]).expand(3, 2)))
    expected = torch.zeros(3, 3, 8, 8)
    expected[:, :, 1:, 2:] = images[:, :, :-1, :-2] / 255
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=0)


def test_one_image_equals_the_same_image_in_a_batch() -> None:
    policy = ViewPolicy(size=16, blur_probability=0.5)
    images = photographs(6, 20, 20)
    parameters = draw(policy, 6, generator())
    together = views_of_pictures(policy, images, parameters)
    for i in range(6):
        rows = {f.name: getattr(parameters, f.name)[i : i + 1] for f in dataclasses.fields(parameters)}
        alone = views_of_pictures(policy, images[i : i + 1], ViewParameters(**rows))
        torch.testing.assert_close(alone[0], together[i], atol=1e-6, rtol=0)


def test_each_operation_follows_the_eight_bit_pipeline_of_pil() -> None:
    """PIL rounds to 8 bits after each operation, so that up to three levels may differ."""
    image = photographs(1, 40, 48)
    picture = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    still = draw(policy_of(size=24, **PLAIN), 1, generator())
    on, off = torch.tensor([True]), torch.tensor([False])
    # Of 40 x 48 px, a crop of 30 x 36 at (3, 5).
    box = dict(
        area=torch.full((1, 10), 30 * 36 / (40 * 48), dtype=torch.float64),
        aspect=torch.full((1, 10), 36 / 30, dtype=torch.float64),
        place=torch.tensor([[3.5 / 11, 5.5 / 13]], dtype=torch.float64),
    )
    area, aspect, place = (value[0].tolist() for value in box.values())
    assert box_of(area, aspect, place, (1, 2), 40, 48) == (3, 5, 30, 36)
    small = picture.crop((5, 3, 41, 33)).resize((24, 24), Image.Resampling.BICUBIC)

    def factors(**changed: float) -> dict[str, Tensor]:
        values = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0, **changed}
        return {name: torch.tensor([value]) for name, value in values.items()}

    cases: list[tuple[dict[str, Tensor], Image.Image]] = [
        (dict(jitter=off), small),
        (dict(jitter=on) | factors(brightness=0.7), ImageEnhance.Brightness(small).enhance(0.7)),
        (dict(jitter=on) | factors(contrast=1.3), ImageEnhance.Contrast(small).enhance(1.3)),
        (dict(jitter=on) | factors(saturation=0.8), ImageEnhance.Color(small).enhance(0.8)),
        (dict(jitter=on) | factors(hue=0.1), V1.adjust_hue(small, 0.1)),  # pyright: ignore
        (dict(grey=on), small.convert("L").convert("RGB")),
        (dict(solarize=on), ImageOps.solarize(small, 128)),
        (dict(flip=on), ImageOps.mirror(small)),
    ]
    policy = policy_of(size=24, **PLAIN)
    for changes, expected in cases:
        view = views_of_pictures(policy, image, repeated(still, **box, **changes))
        levels = torch.from_numpy(np.array(expected)).permute(2, 0, 1).float()
        difference = (view[0] * 255 - levels).abs()
        # PIL holds the hue itself in 8 bits: a step of 1/256 turn moves a channel by 6 levels, and it rounds twice.
        allowed = 12 if changes.get("hue", off).item() else 3
        assert difference.max() <= allowed, (list(changes), difference.max())
        assert difference.mean() < 2, list(changes)


def test_values_are_in_the_unit_range_before_mean_and_std() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 4, 4)
    plain = views_of_pictures(policy_of(size=4, **PLAIN), images, draw(policy_of(size=4, **PLAIN), 3, generator()))
    torch.testing.assert_close(plain[:, 0, 0, 0], torch.tensor([0.0, 0.2, 1.0]))
    policy = policy_of(size=4, **(PLAIN | dict(mean=MEAN, std=STD)))
    views = RandomView(policy)(images, generator())
    for channel in range(3):
        expected = (0.2 - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(views[1, channel], torch.full((4, 4), expected))


def test_full_scale_and_square_ratio_crop_nothing() -> None:
    images = photographs(5, 16, 16)
    views = RandomView(policy_of(size=16, **PLAIN))(images, generator())
    torch.testing.assert_close(views, images / 255, atol=1e-7, rtol=0)


def test_same_generator_state_same_views_and_probabilities_shift_no_other_draw() -> None:
    images = photographs(8, 24, 24)
    policy = ViewPolicy(size=16, blur_probability=0.5)
    first, second = RandomView(policy)(images, generator(4)), RandomView(policy)(images, generator(4))
    assert torch.equal(first, second)
    assert not torch.equal(first, RandomView(policy)(images, generator(5)))
    state = generator(4)
    assert not torch.equal(RandomView(policy)(images, state), RandomView(policy)(images, state))
    before = draw(policy, 8, generator(4))
    after = draw(policy.model_copy(update=dict(jitter_probability=0.0)), 8, generator(4))
    assert not after.jitter.any()
    assert torch.equal(before.sigma, after.sigma)
    assert torch.equal(before.order, after.order)


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    RandomView(ViewPolicy(size=8))(photographs(4, 10, 10), generator())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_blur_at_96_px_reaches_the_sigma_asked_for() -> None:
    """An impulse spreads with about the standard deviation drawn, as by PIL, whose kernel has no fixed size."""
    image = torch.zeros(1, 3, 96, 96, dtype=torch.uint8)
    image[:, :, 48, 48] = 255
    policy = policy_of(size=96, **(PLAIN | dict(blur_probability=1.0, blur_sigma=(1.5, 1.5))))
    spread = RandomView(policy)(image, generator())[0, 0]
    position = torch.arange(96.0) - 48
    assert spread.sum().item() == pytest.approx(1, abs=1e-4)
    assert (spread.sum(0) * position**2).sum().sqrt().item() == pytest.approx(1.5, rel=0.05)


def test_views_refuse_wrong_batches() -> None:
    policy = ViewPolicy(size=8)
    parameters = draw(policy, 2, generator())
    for wrong in (torch.rand(2, 3, 8, 8), photographs(2, 8, 8)[0], photographs(2, 8, 8, channels=2)):
        with pytest.raises(ValueError, match="uint8"):
            views_of_pictures(policy, wrong, parameters)
        with pytest.raises(ValueError, match="uint8"):
            RandomView(policy)(wrong, generator())
    with pytest.raises(ValueError, match="2 views"):
        views_of_pictures(policy, photographs(3, 8, 8), parameters)
    with pytest.raises(ValueError, match="count"):
        draw(policy, 0, generator())


def test_equal_images_become_different_views() -> None:
    same = photographs(1, 32, 32).expand(16, -1, -1, -1)
    assert len(RandomView(ViewPolicy(size=16))(same, generator()).unique(dim=0)) == 16
