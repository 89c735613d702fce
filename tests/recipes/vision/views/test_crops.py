"""Crops of pictures of any size: Pillow's pixels, torchvision's evaluation, and boxes one by one as in a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as V1
from torchvision.transforms.v2 import functional as V2

from recipes.vision.pictures.decoding import decode
from recipes.vision.pipeline.work import RandomCrops
from recipes.vision.views.batched_views import views_of_crops
from recipes.vision.views.crops import LONGEST, box_of, boxes, central_square, central_view, cropped, resized
from recipes.vision.views.evaluation_view import eval_resize
from recipes.vision.views.view_policy import ViewParameters, ViewPolicy, draw
from tests.support.recipes.sample_photographs import by_pillow, encoded, photograph, pixels
from tests.support.recipes.view_reference import PLAIN, generator, policy_of, reference_view

FILES: dict[str, bytes] = {
    "wide": encoded(photograph(0)),
    "high": encoded(photograph(1, 375, 500)),
    "grey": encoded(photograph(2, 480, 360, "L")),
    "progressive": encoded(photograph(3, 512, 384), progressive=True),
    "PNG": encoded(photograph(4), "PNG"),
    "on its side": encoded(photograph(5), turn=6),
    "small": encoded(photograph(6, 40, 30)),
    "strip": encoded(photograph(7, 300, 11)),
    "line": encoded(photograph(8, 1, 90)),
    "pixel": encoded(photograph(9, 1, 1)),
}
MODES = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [32, 96, 224, 450])
@pytest.mark.parametrize("file", FILES)
def test_a_crop_is_pillows_of_the_original(file: str, size: int, interpolation: Any) -> None:
    """Whatever the size of the picture, enlarged or reduced: within 1/255, and a pixel in 10,000 within 2/255.

    Rows first, then columns: in which order depends on the version of Pillow, and overshoot is cut off in between.
    """
    policy = ViewPolicy(size=size, interpolation=interpolation, crop_scale=(0.08, 1.0), crop_ratio=(0.5, 2.0))
    parameters = draw(policy, 6, generator(size))
    crops = RandomCrops.drawn(policy, parameters)
    picture, original = decode(FILES[file], file), by_pillow(FILES[file])
    for i in range(len(parameters)):
        box = parameters.area[i].tolist(), parameters.aspect[i].tolist(), parameters.place[i].tolist()
        top, left, height, width = box_of(*box, policy.crop_ratio, original.height, original.width)
        part = original.crop((left, top, left + width, top + height))
        part = part.resize((size, height), MODES[interpolation]).resize((size, size), MODES[interpolation])
        made = crops.of(i, picture.unsqueeze(0))
        assert made.shape == (1, 3, size, size)
        apart = (made[0].int() - pixels(part).int()).abs()
        assert apart.max() <= 2
        assert (apart > 1).sum() <= max(2, 1e-4 * apart.numel())


EVERYTHING: dict[str, Any] = dict(
    jitter_probability=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    flip_probability=0.5,
    grey_probability=0.2,
    blur_probability=0.5,
    blur_sigma=(0.1, 2.0),
)
COUNT = 24


def made_from_files(policy: ViewPolicy, parameters: ViewParameters) -> tuple[Tensor, Tensor]:
    """Views through uint8 crops of the files, and torchvision's in float, both [N, 3, size, size]."""
    pictures = [decode(content, name) for name, content in FILES.items()]
    chosen = [pictures[i % len(pictures)] for i in range(len(parameters))]
    crops = RandomCrops.drawn(policy, parameters)
    made = torch.cat([crops.of(i, picture.unsqueeze(0)) for i, picture in enumerate(chosen)])
    expected = [reference_view(policy, picture, parameters, i) for i, picture in enumerate(chosen)]
    return views_of_crops(policy, made, parameters), torch.stack(expected)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [32, 96])
def test_a_view_of_a_file_is_torchvisions(size: int, interpolation: Any) -> None:
    """Within 5/255 in float, though its crop was rounded to 8 bits on the way."""
    policy = policy_of(**PLAIN | dict(size=size, interpolation=interpolation, crop_scale=(0.2, 1.0)) | EVERYTHING)
    made, expected = made_from_files(policy, draw(policy, COUNT, generator(1)))
    assert (made - expected).abs().max() <= 5 / 255


def test_a_normalised_view_is_torchvisions() -> None:
    policy = policy_of(size=64, **EVERYTHING)
    made, expected = made_from_files(policy, draw(policy, COUNT, generator(2)))
    scale = torch.tensor(policy.std).view(3, 1, 1)
    assert ((made - expected) * scale).abs().max() <= 5 / 255
    assert made.mean().abs() > 0.01


def test_a_solarised_view_is_torchvisions() -> None:
    """Of a pixel whose value lies within the rounding of the threshold both sides are right."""
    policy = policy_of(**PLAIN | dict(size=64, crop_scale=(0.2, 1.0), solarize_probability=1.0))
    made, expected = made_from_files(policy, draw(policy, COUNT, generator(3)))
    folded = torch.minimum(made, 1 - made) - torch.minimum(expected, 1 - expected)
    assert folded.abs().max() <= 5 / 255
    assert ((made - expected).abs() > 5 / 255).float().mean() < 0.01


@pytest.mark.parametrize(
    "size",
    [
        (500, 375),
        (375, 500),
        (96, 96),
        (109, 109),
        (110, 109),
        (64, 48),
        (30, 700),
        (1500, 190),
        (700, 88),
        (3, 5),
        (1, 1),
        (1, 8),
    ],
)
@pytest.mark.parametrize("crop", [96, 32, 224, 1])
def test_an_evaluation_is_torchvisions_resize_and_centre_crop(crop: int, size: tuple[int, int]) -> None:
    """Within 2/255 in float, of the original picture, bilinear; bicubic overshoot is cut off between the passes."""
    picture, resize = pixels(photograph(1, *size)), max(crop, eval_resize(crop))
    for interpolation, mode in (("bilinear", InterpolationMode.BILINEAR), ("bicubic", InterpolationMode.BICUBIC)):
        whole = V1.resize(picture.float(), [resize], mode, antialias=True).clamp(0, 255)
        made = central_view(picture.unsqueeze(0), resize, crop, interpolation)
        assert made.shape == (1, 3, crop, crop)
        apart = (made[0].float() - V1.center_crop(whole, [crop, crop])).abs()
        if max(size) > LONGEST * min(size):
            # The longer side is cut first: the centre of an even number of pixels may lie half a pixel off.
            assert apart.mean() <= 8 or crop == 1
            continue
        assert apart.max() <= 2 or interpolation == "bicubic"
        assert apart.mean() <= 0.5
        by_rounding = V2.resize(picture, [resize], mode, antialias=True)
        assert torch.equal(made[0], V1.center_crop(by_rounding, [crop, crop]))


@pytest.mark.parametrize(("height", "width"), [(1, 200_000), (200_000, 1), (2, 60_000)])
def test_a_strip_does_not_grow_when_it_is_resized(height: int, width: int) -> None:
    picture = torch.full((1, 3, height, width), 7, dtype=torch.uint8)
    made = central_view(picture, 109, 96, "bilinear")
    assert made.shape == (1, 3, 96, 96)
    assert (made == 7).all()
    square = central_square(picture, 96, "bicubic")
    assert square.shape == (1, 3, 96, 96)
    assert (square == 7).all()


def test_the_centre_of_a_strip_is_its_centre() -> None:
    picture = torch.zeros(1, 3, 10, 1001, dtype=torch.uint8)
    picture[..., 500] = 255
    made = central_view(picture, 110, 90, "bilinear").float().mean(dim=(0, 1, 2))
    middle = (made * torch.arange(90)).sum() / made.sum()
    assert abs(float(middle) - 44.5) <= 6


def test_a_picture_of_the_right_size_is_not_resampled() -> None:
    picture = pixels(photograph(1, 109, 140)).unsqueeze(0)
    assert torch.equal(central_view(picture, 109, 96, "bilinear"), picture[:, :, 22:118, 6:102])
    assert torch.equal(central_square(picture, 109, "bicubic"), picture[:, :, 16:125, :])
    assert torch.equal(resized(picture, 140, 109, "bicubic"), picture)
    assert torch.equal(cropped(picture, (3, 5, 20, 20), 20, "bilinear"), picture[:, :, 3:23, 5:25])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_picture_among_others_is_what_it_is_alone(channels: int, interpolation: str) -> None:
    pictures = torch.stack([pixels(photograph(i, 60, 44)) for i in range(5)])[:, :channels]
    together = cropped(pictures, (3, 8, 37, 41), 24, interpolation)
    alone = [cropped(picture.unsqueeze(0), (3, 8, 37, 41), 24, interpolation) for picture in pictures]
    assert torch.equal(together, torch.cat(alone))
    strided = pictures.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(cropped(strided, (3, 8, 37, 41), 24, interpolation), together)


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    scale=st.sampled_from([(0.5, 1.0), (0.08, 1.0), (1.0, 1.0), (1e-6, 1e-5), (0.9, 1.0)]),
    ratio=st.sampled_from([(3 / 4, 4 / 3), (0.5, 1.0), (1.0, 1.0), (3.0, 4.0), (0.01, 100.0)]),
    seed=st.integers(0, 2**40),
)
def test_boxes_are_those_of_each_picture_number_for_number(
    height: int, width: int, scale: Any, ratio: Any, seed: int
) -> None:
    drawn = draw(ViewPolicy(size=8, crop_scale=scale, crop_ratio=ratio), 40, generator(seed))
    found = boxes(drawn.area, drawn.aspect, drawn.place, ratio, height, width)
    rows = torch.stack((found.top, found.left, found.height, found.width), dim=1).tolist()
    for i, row in enumerate(rows):
        area, aspect, place = (part[i].tolist() for part in (drawn.area, drawn.aspect, drawn.place))
        assert box_of(area, aspect, place, ratio, height, width) == tuple(row)
        top, left, crop_height, crop_width = row
        assert 0 <= top <= height - crop_height
        assert 0 <= left <= width - crop_width


def test_places_at_the_ends_of_their_range() -> None:
    almost = 1 - 2**-53
    for place, expected in (((0.0, 0.0), (0, 0)), ((almost, almost), (50, 60))):
        assert box_of([0.25], [1.0], place, (1, 1), 100, 110)[:2] == tuple(
            min(e, w) for e, w in zip(expected, (48, 58), strict=True)
        )
