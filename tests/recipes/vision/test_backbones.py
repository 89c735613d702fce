"""Backbones by torchvision's names and own ones by ``module:Class``."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models

from bilevel.nn.functional import curvature_pass, functional_call
from recipes.experiment.errors import ConfigError
from recipes.experiment.plugins import PluginError
from recipes.vision.networks.backbones import build_backbone, check_backbone
from recipes.vision.networks.torchvision_backbones import HardSigmoid, network_options
from tests.support.recipes.small_runs import small_config

# Name, side of the images, and the part of torchvision's network whose input are the features (or their map, m).
CHEAP = [
    ("mobilenet_v3_small", 64, "classifier"),
    ("shufflenet_v2_x0_5", 64, "fc"),
    ("squeezenet1_1", 64, "classifier m"),
    ("mnasnet0_5", 64, "classifier"),
    ("efficientnet_b0", 32, "classifier"),
]
DEAR = [
    ("alexnet", 96, "avgpool m"),
    ("vgg11_bn", 64, "avgpool m"),
    ("densenet121", 64, "classifier"),
    ("mobilenet_v2", 64, "classifier"),
    ("convnext_tiny", 64, "classifier.2"),
    ("swin_t", 64, "head"),
    ("swin_v2_t", 64, "head"),
    ("maxvit_t", 224, "classifier.3"),
    ("regnet_y_400mf", 64, "fc"),
    ("googlenet", 64, "fc"),
    ("inception_v3", 107, "fc"),
    ("vit_b_32", 64, "heads"),
]
FAMILIES = [*CHEAP, *(pytest.param(*case, marks=pytest.mark.slow) for case in DEAR)]


def theirs_of(name: str, size: int, backbone: nn.Module) -> nn.Module:
    """Torchvision's network with the backbone's weights; only weights of the classifier may be missing."""
    network = models.get_model(name, weights=None, **network_options(name, size))
    report = network.load_state_dict(backbone.state_dict(), strict=False)
    assert report.unexpected_keys == []
    assert {key.partition(".")[0] for key in report.missing_keys} <= {"classifier", "fc", "head", "heads"}
    return network


@pytest.mark.parametrize(("name", "size", "where"), FAMILIES)
def test_features_are_what_the_classifier_gets(name: str, size: int, where: str) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(name, image_size=size).eval()
    network, inputs = theirs_of(name, size, backbone).eval(), []
    module, _, as_map = where.partition(" ")
    network.get_submodule(module).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features, feature_map = backbone(images), backbone(images, feature_map=True)
        network(images)
    assert features.shape == (2, backbone.num_features)
    assert feature_map.shape[:2] == (2, backbone.num_features)
    assert feature_map.dim() == 4
    expected = feature_map if as_map else features
    torch.testing.assert_close(expected, inputs[0].flatten(1) if not as_map else inputs[0], rtol=1e-4, atol=1e-5)
    if not name.startswith(("convnext", "maxvit", "vit")):
        torch.testing.assert_close(features, feature_map.mean(dim=(2, 3)))


@pytest.mark.parametrize(("name", "size"), [case[:2] for case in CHEAP])
def test_every_weight_is_used_and_differentiates_twice(name: str, size: int) -> None:
    torch.manual_seed(0)
    backbone, images = build_backbone(name, image_size=size).train(), torch.randn(4, 3, size, size)
    point = {key: value.detach().requires_grad_() for key, value in backbone.named_parameters()}
    with curvature_pass(seed=0):
        loss = functional_call(backbone, point, (images,)).square().mean()
    gradients = torch.autograd.grad(loss, list(point.values()), create_graph=True)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    along = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
    products = torch.autograd.grad(along, list(point.values()), materialize_grads=True)
    assert all(bool(product.isfinite().all()) for product in products)
    assert sum(float(product.norm()) for product in products) > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:attention takes torch's plain")
@pytest.mark.parametrize(("name", "size"), [case[:2] for case in DEAR if not case[0].startswith("swin_v2")])
def test_every_weight_of_the_larger_ones_differentiates_twice(name: str, size: int) -> None:
    test_every_weight_is_used_and_differentiates_twice(name, size)


def test_the_hard_sigmoid_is_torchs() -> None:
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    torch.testing.assert_close(HardSigmoid()(x), nn.functional.hardsigmoid(x))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("vit_b_16", 40, "multiple of 16 px, not 40"),
        ("vit_h_14", 32, "multiple of 14 px, not 32"),
        ("maxvit_t", 96, "multiple of 224 px, not 96"),
        ("inception_v3", 64, "at least 75 px, not 64"),
        ("vgg16", 16, "at least 32 px, not 16"),
        ("resnet19", None, "no classification network 'resnet19'.*list_models.*resnet-tiny.*module:Class"),
        ("fasterrcnn_resnet50_fpn", None, "no classification network"),
    ],
)
def test_refused_before_anything_is_built(name: str, size: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_backbone(name, size)


@pytest.mark.parametrize(("name", "size"), [("vit_b_16", 48), ("maxvit_t", 448), ("swin_t", 32), ("resnet34", 8)])
def test_sizes_that_fit(name: str, size: int) -> None:
    check_backbone(name, size)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "vit_b_32",
            ['--pretext.options={"view2": {"size": 64}}'],
            "pretext.options: vit_b_32 .*image_size=32 px.* 64 px",
        ),
        ("vit_b_32", ['--downstream.options={"view": {"size": 64}}'], "downstream.options: vit_b_32 .* 64 px"),
        (
            "vgg11",
            ['--pretext.options={"view1": {"size": 16}}'],
            "pretext.options: vgg11 takes images of at least 32 px",
        ),
        (
            "resnet18",
            ['--pretext.options={"view1": {"size": 16}, "joint_pass": true}'],
            "joint_pass needs views of one size",
        ),
    ],
    ids=["pretext", "downstream", "too-small", "joint-pass"],
)
def test_views_that_the_backbone_cannot_take_are_refused(name: str, options: list[str], message: str) -> None:
    size = [f"--model.backbone={name}", "--data.image-size=32"]
    assert small_config(*size).model.backbone == name
    with pytest.raises(ConfigError, match=message):
        small_config(*size, *options)


def test_convolutions_take_views_of_other_sizes() -> None:
    small_config("--model.backbone=resnet18", "--data.image-size=32", '--pretext.options={"view1": {"size": 16}}')


OWN = """
from torch import nn

class Good(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_features, self.conv = 5, nn.Conv2d(3, 5, 3)
    def forward(self, x, feature_map=False):
        x = self.conv(x)
        return x if feature_map else x.mean(dim=(2, 3))

class NoFeatures(Good):
    def __init__(self):
        super().__init__()
        self.num_features = "5"

class NoMap(Good):
    def forward(self, x):
        return x

class Arguments(Good):
    def __init__(self, width):
        super().__init__()

def function():
    pass
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_backbones.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_backbones"


def test_an_own_backbone(own: str) -> None:
    backbone = build_backbone(f"{own}:Good", image_size=16)
    assert backbone(torch.zeros(2, 3, 16, 16)).shape == (2, 5)
    assert small_config("--model.backbone", f"{own}:Good").model.backbone == f"{own}:Good"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NoFeatures", "num_features must be a positive int, got '5'"),
        ("NoMap", r"forward\(self, x, feature_map=False\)"),
        ("Arguments", "cannot be made without arguments.*width"),
        ("function", "not a subclass of torch.nn.Module"),
        ("Missing", "has no 'Missing'; its classes: Arguments, Good"),
    ],
)
def test_own_backbones_that_are_refused(own: str, name: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        build_backbone(f"{own}:{name}")


def test_the_config_names_the_field(own: str) -> None:
    for name, message in (("resnet19", "list_models"), (f"{own}:NoMap", "feature_map=False"), ("nowhere:X", "nowhere")):
        with pytest.raises(ConfigError, match=rf"model.backbone: .*{re.escape(message)}"):
            small_config("--model.backbone", name)
