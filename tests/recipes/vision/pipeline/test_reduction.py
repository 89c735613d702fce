"""How small a picture may be kept: every crop that a view may take stays large enough."""

import math

import pytest
import torch

from recipes.vision.pipeline.reduction import MARGIN, WORTH, View, kept_size, needs
from recipes.vision.views.crops import boxes
from recipes.vision.views.evaluation_view import EvalView
from recipes.vision.views.view_policy import ViewPolicy, draw

SIZES = [(375, 500), (3000, 4000), (4000, 3000), (1200, 1200), (500, 8000), (9000, 700), (64, 64)]
RATIOS = [(3 / 4, 4 / 3), (1.0, 1.0), (0.5, 1.0), (2.0, 3.0)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("least", [0.08, 0.5, 1.0])
def test_the_smallest_crop_of_a_reduced_picture_is_long_enough(size, ratio, least) -> None:
    view = ViewPolicy(size=24, crop_scale=(least, 1.0), crop_ratio=ratio)
    height, width = kept_size(size, [view])
    if (height, width) == size:
        return
    drawn = draw(view, 2000, torch.Generator().manual_seed(0))
    found = boxes(drawn.area, drawn.aspect, drawn.place, ratio, *size)
    shortest = min(int((found.height * (height / size[0])).min()), int((found.width * (width / size[1])).min()))
    # A drawn side is rounded to a pixel of the original.
    assert shortest >= MARGIN * 24 - 1
    assert height * width <= WORTH * size[0] * size[1] * 1.01
    assert abs(width / height - size[1] / size[0]) < 0.02 * size[1] / size[0]


@pytest.mark.parametrize(
    ("views", "expected"),
    [
        ([EvalView(resize=50, crop=40)], (200, 400)),
        ([15], (120, 240)),
        ([15, EvalView(resize=50, crop=40)], (200, 400)),
        ([ViewPolicy(size=50, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))], (200, 400)),
        ([ViewPolicy(size=25, crop_scale=(0.25, 1.0), crop_ratio=(1.0, 1.0))], (142, 283)),
        ([EvalView(resize=250, crop=200)], (1000, 2000)),
        ([EvalView(resize=180, crop=180)], (1000, 2000)),
    ],
)
def test_sizes_by_hand(views: list[View], expected: tuple[int, int]) -> None:
    """Of 1000 x 2000: four times what its shorter side, or the smallest crop, becomes, eight times for whole
    squares; half the pixels or nothing.

    A quarter of the area as a square has sides of sqrt(500,000) = 707 px, which become 100: 0.1414 of the sides.
    """
    assert kept_size((1000, 2000), views) == expected


def test_a_picture_as_small_as_its_views_is_kept() -> None:
    assert kept_size((109, 150), [EvalView(resize=109, crop=96)]) == (109, 150)


def test_needs_tell_views_apart_by_what_decides_the_size_alone() -> None:
    view = ViewPolicy(size=96)
    assert needs([view]) == needs([view, view.model_copy(update={"blur_probability": 0.5})])
    others: list[list[View]] = [
        [ViewPolicy(size=95)],
        [ViewPolicy(size=96, crop_scale=(0.4, 1.0))],
        [ViewPolicy(size=96, crop_ratio=(0.5, 1.0))],
        [view, EvalView(resize=109, crop=96)],
    ]
    found = [repr(needs(views)) for views in [[view], *others]]
    assert len(set(found)) == len(found)
    assert all(math.isfinite(number) for row in needs(others[-1]) for number in row)
