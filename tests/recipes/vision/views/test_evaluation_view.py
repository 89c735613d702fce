"""The view of an evaluation, against torchvision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as V1

from recipes.vision.views.evaluation_view import EvalView, eval_resize
from recipes.vision.views.view_policy import IMAGENET_MEAN as MEAN
from recipes.vision.views.view_policy import IMAGENET_STD as STD
from tests.support.recipes.view_reference import photographs


def test_sides_of_the_resize() -> None:
    assert [eval_resize(side) for side in (96, 224, 32, 8)] == [109, 256, 36, 9]


@pytest.mark.parametrize(("height", "width"), [(120, 150), (150, 120), (109, 109), (64, 200)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_eval_view_is_torchvisions_resize_and_centre_crop(height: int, width: int, interpolation: Any) -> None:
    images = photographs(5, height, width)
    view = EvalView(eval_resize(96), 96, interpolation=interpolation)
    views = view(images)
    assert views.dtype == torch.float32
    for image, ours in zip(images, views, strict=True):
        whole = V1.resize(image.float() / 255, [109], InterpolationMode(interpolation), antialias=True).clamp(0, 1)
        expected = V1.normalize(V1.center_crop(whole, [96, 96]), list(MEAN), list(STD))
        assert ((ours - expected) * torch.tensor(STD).view(3, 1, 1)).abs().max() <= 2 / 255
    assert torch.equal(view(images), views)


def test_grey_pictures_become_three_channels() -> None:
    images = photographs(3, 40, 50, channels=1)
    view = EvalView(36, 32)
    assert torch.equal(view(images), view(images.expand(-1, 3, -1, -1)))


def test_eval_view_at_the_same_size_only_normalises() -> None:
    images = photographs(4, 8, 8, channels=1)
    views = EvalView(8, 8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.2))(images)
    for channel, (mean, std) in enumerate([(0.1, 0.5), (0.2, 0.4), (0.3, 0.2)]):
        torch.testing.assert_close(views[:, channel], (images[:, 0] / 255 - mean) / std)


@pytest.mark.parametrize("arguments", [(8, 9), (8, 0), (8, 8, MEAN, (1, 0, 1)), (8, 8, MEAN, STD, "nearest")])
def test_eval_view_refuses_bad_values(arguments: Any) -> None:
    with pytest.raises(ValueError, match=r"crop|std|interpolation"):
        EvalView(*arguments)


def test_eval_view_refuses_wrong_batches() -> None:
    for wrong in (torch.rand(2, 3, 8, 8), photographs(2, 8, 8)[0], photographs(2, 8, 8, channels=2)):
        with pytest.raises(ValueError, match="uint8"):
            EvalView(8, 8)(wrong)
