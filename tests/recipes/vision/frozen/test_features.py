"""Features of pictures that nothing trains: pixels, patches, backbones of given weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from recipes.experiment.errors import ConfigError
from recipes.vision.frozen.features import FrozenFeatures, Reading, in_one_view
from recipes.vision.frozen.patches import PatchFeatures
from recipes.vision.frozen.section import FrozenSection
from recipes.vision.imagesets import ImageSet
from recipes.vision.networks.backbones import build_backbone
from recipes.vision.views.evaluation_view import EvalView, eval_resize
from tests.support.recipes.image_trees import labelled, tree

CPU = torch.device("cpu")


def noise(count: int, side: int, channels: int = 3, seed: int = 0) -> Tensor:
    drawn = np.random.default_rng(seed).integers(0, 256, (count, channels, side, side), dtype=np.uint8)
    return torch.from_numpy(drawn)


def images(pixels: Tensor) -> ImageSet:
    return ImageSet(pixels, None, (), "noise")


def features(section: FrozenSection, *sets: ImageSet, native: int | None = None) -> Tensor:
    return FrozenFeatures(section.settled(native), 2048).of(sets, 0, CPU)


def test_pixels_are_the_pictures_and_grey_ones_have_one_channel() -> None:
    colour, grey = noise(5, 8), noise(4, 8, channels=1)
    section = FrozenSection(features="pixels", image_size=8, batch_size=3)
    assert torch.equal(features(section, images(colour)), colour.float().flatten(1))
    assert torch.equal(features(section, images(grey)), grey.float().flatten(1))
    both = features(section, images(colour), images(grey))
    assert torch.equal(both, torch.cat([colour, grey.expand(-1, 3, -1, -1)]).float().flatten(1))


def test_streamed_pictures_give_the_same_in_any_number_of_workers(tmp_path: Path) -> None:
    folder = f"folder:{tree(tmp_path / 'images', {'a': 3, 'b': 4})}"
    views = []
    for storage, workers in (("memory", 0), ("stream", 0), ("stream", 1)):
        reading = Reading(3, workers, CPU)
        views.append(torch.cat(list(in_one_view(labelled(folder, storage=storage), 16, reading))))
    assert views[0].shape == (7, 3, 16, 16)
    assert torch.equal(views[0], views[1])
    assert torch.equal(views[0], views[2])


def by_hand(network: PatchFeatures, picture: Tensor) -> Tensor:
    """The features of one picture, patch by patch."""
    side = picture.shape[-1]
    places = range(0, side - 5, 2)
    filters, offset = network.get_buffer("weight").double(), network.get_buffer("offset").double()
    responses = []
    for top in places:
        for left in places:
            patch = picture[:, top : top + 6, left : left + 6].double().flatten()
            patch = (patch - patch.mean()) / (patch.var() + 10.0).sqrt()
            responses.append(filters @ patch - offset)
    grid = torch.stack(responses).view(len(places), len(places), -1).permute(2, 0, 1)
    both = torch.cat([(grid - 0.25).clamp(min=0), (-grid - 0.25).clamp(min=0)])
    return torch.nn.functional.adaptive_avg_pool2d(both, 2).flatten()


def test_patches_by_hand() -> None:
    pictures = noise(6, 16)
    network = PatchFeatures(pictures, 5, seed=3)
    assert network.num_features == 40
    found = network(pictures)
    assert found.shape == (6, 40)
    torch.testing.assert_close(found[2].double(), by_hand(network, pictures[2]), rtol=1e-4, atol=1e-5)


def test_filters_have_length_one_where_patches_are_white() -> None:
    network = PatchFeatures(noise(50, 16), 8)
    # Of independent pixels all variances are nearly one, so that whitening shrinks by a factor of about 1 / sqrt(1.1).
    lengths = network.get_buffer("weight").norm(dim=1) * 1.1**0.5
    assert ((lengths - 1.0).abs() < 0.1).all()


def test_patches_are_of_the_first_set_and_the_same_again() -> None:
    section = FrozenSection(features="patches", image_size=16, filters=4)
    first, second = images(noise(5, 16)), images(noise(3, 16, seed=1))
    found = features(section, first, second)
    assert found.shape == (8, 32)
    assert torch.equal(found, features(section, first, second))
    assert torch.equal(found[:5], features(section, first))
    assert not torch.equal(found[5:], features(section, second))


def test_a_backbone_sees_the_view_of_an_evaluation(tmp_path: Path) -> None:
    torch.manual_seed(5)
    backbone = build_backbone("resnet-tiny")
    torch.save(backbone.state_dict(), tmp_path / "w.pt")
    section = FrozenSection(backbone="resnet-tiny", init_backbone=str(tmp_path / "w.pt"), image_size=16)
    pixels = noise(4, 20)
    with torch.no_grad():
        expected = backbone.eval()(EvalView(eval_resize(16), 16)(pixels))
    assert torch.equal(features(section, images(pixels)), expected)


def test_random_weights_of_a_backbone_are_the_same_again_and_leave_the_generator() -> None:
    section = FrozenSection(backbone="resnet-tiny", image_size=16)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, two = (features(section, images(noise(2, 16))) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_decides_features_tells_weights_apart(tmp_path: Path) -> None:
    kept = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        path = tmp_path / f"{seed}.pt"
        torch.save(build_backbone("resnet-tiny").state_dict(), path)
        section = FrozenSection(backbone="resnet-tiny", init_backbone=str(path), image_size=16)
        kept.append(FrozenFeatures(section.settled(), 2048).decisive)
    kept.append(FrozenFeatures(FrozenSection(backbone="resnet-tiny", image_size=16).settled(), 2048).decisive)
    assert len({str(one) for one in kept}) == 3


def test_features_that_are_too_wide_are_refused() -> None:
    wide = FrozenFeatures(FrozenSection(backbone="resnet-tiny", image_size=16).settled(), 63)
    with pytest.raises(ConfigError, match=r"model\.backbone: resnet-tiny has 64 features, and at most 63 can be used"):
        _ = wide.backbone
    with pytest.raises(ConfigError, match=r"model\.image_size: a picture of 16 px has 768 features"):
        FrozenFeatures(FrozenSection(image_size=16).settled(), 700).of([images(noise(2, 16))], 0, CPU)


def test_a_backbone_that_overflows_is_refused(tmp_path: Path) -> None:
    """Weights that are finite themselves."""
    weights = build_backbone("resnet-tiny").state_dict()
    weights["conv1.weight"].fill_(3e38)
    torch.save(weights, tmp_path / "w.pt")
    section = FrozenSection(backbone="resnet-tiny", init_backbone=str(tmp_path / "w.pt"), image_size=16)
    said = r"model\.backbone: resnet-tiny makes NaN or infinity of 3 pictures out of 3; .*init_backbone"
    with pytest.raises(ConfigError, match=said):
        features(section, images(noise(3, 16)))
