"""Backbones by ``timm:NAME``: features, feature maps, second derivatives, weights from files, and refusals."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bilevel.nn import SyncBatchNorm, synchronised
from bilevel.nn.functional import curvature_pass, functional_call
from recipes.bissl.commands.main import main
from recipes.experiment.errors import ConfigError
from recipes.vision.networks.backbones import build_backbone, check_backbone, check_view
from recipes.vision.networks.foreign_weights import load_backbone
from recipes.vision.networks.timm_backbones import TimmBackbone
from recipes.vision.networks.weight_files import read_weights
from tests.support.recipes.small_runs import small_config

timm = pytest.importorskip("timm", reason="timm's networks are in the extra timm")

# Name, side of the images, features, and sides of the map; None: the classifier sees more than the map.
CASES = [
    ("resnet10t", 64, 512, 2),
    ("mobilenetv3_small_050", 64, 1024, None),
    ("tinynet_e", 64, 1280, 2),
    ("vit_tiny_patch16_224", 32, 192, 2),
    ("test_convnext", 32, 64, 1),
]
DEAR = [
    ("swin_tiny_patch4_window7_224", 64, 768, 2),
    ("efficientformerv2_s0", 224, 176, 7),
    ("densenet121", 64, 1024, 2),
    ("regnetx_002", 64, 368, 2),
    ("mobilevit_xxs", 64, 320, 2),
    ("fastvit_t8", 64, 768, 2),
    ("xcit_nano_12_p16_224", 64, 128, 4),
    ("tiny_vit_5m_224", 64, 320, 2),
]
FAMILIES = [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in DEAR)]


def theirs(name: str, size: int, backbone: TimmBackbone) -> nn.Module:
    """timm's network, as timm makes it, with the backbone's weights."""
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    network = timm.create_model(name, num_classes=0, **({"img_size": size} if fixed else {}))
    network.load_state_dict(backbone.network.state_dict())
    return network


def made(name: str, size: int) -> TimmBackbone:
    backbone = build_backbone(f"timm:{name}", image_size=size)
    assert isinstance(backbone, TimmBackbone)
    return backbone


@pytest.mark.parametrize(("name", "size", "features", "side"), FAMILIES)
def test_features_are_timms_in_both_modes(name: str, size: int, features: int, side: int | None) -> None:
    torch.manual_seed(0)
    backbone = made(name, size)
    network, images = theirs(name, size, backbone), torch.randn(4, 3, size, size)
    assert backbone.num_features == features
    for training in (True, False):
        with torch.no_grad():
            found = backbone.train(training)(images)
            torch.testing.assert_close(found, network.train(training)(images), rtol=1e-4, atol=1e-5)
    assert found.shape == (4, features)
    # Running statistics moved alike.
    for key, value in network.state_dict().items():
        torch.testing.assert_close(backbone.network.state_dict()[key], value, rtol=1e-4, atol=1e-5)
    if side is None:
        with pytest.raises(ValueError, match=rf"timm:{name} has no feature map for its {features} features"):
            backbone(images, feature_map=True)
    else:
        with torch.no_grad():
            assert backbone(images, feature_map=True).shape == (4, features, side, side)


@pytest.mark.parametrize("name", ["resnet10t", "regnetx_002", "swin_tiny_patch4_window7_224"])
def test_features_are_the_mean_of_the_feature_map(name: str) -> None:
    backbone = made(name, 64).eval()
    with torch.no_grad():
        images = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(backbone(images), backbone(images, feature_map=True).mean(dim=(2, 3)))


def test_a_transformers_map_is_its_patches_as_a_grid() -> None:
    backbone = made("vit_tiny_patch16_224", 32).eval()
    with torch.no_grad():
        images = torch.randn(2, 3, 32, 32)
        tokens = backbone.network.forward_features(images)
        found = backbone(images, feature_map=True)
    torch.testing.assert_close(found[:, :, 1, 0], tokens[:, 1 + 2])
    torch.testing.assert_close(found[:, :, 0, 1], tokens[:, 1 + 1])


@pytest.mark.filterwarnings("ignore:attention takes torch's plain")
@pytest.mark.parametrize(("name", "size", "features", "side"), FAMILIES)
def test_every_weight_is_used_and_differentiates_twice(name: str, size: int, features: int, side: int | None) -> None:
    torch.manual_seed(0)
    backbone, images = made(name, size).train(), torch.randn(4, 3, size, size)
    point = {key: value.detach().requires_grad_() for key, value in backbone.named_parameters()}
    buffers = {key: value.clone() for key, value in backbone.named_buffers()}
    with curvature_pass(seed=0):
        loss = functional_call(backbone, point, (images,)).square().mean()
    gradients = torch.autograd.grad(loss, list(point.values()), create_graph=True)
    along = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
    products = torch.autograd.grad(along, list(point.values()), materialize_grads=True)
    assert all(bool(product.isfinite().all()) for product in (*gradients, *products))
    assert sum(float(product.norm()) for product in products) > 0
    assert all(torch.equal(value, buffers[key]) for key, value in backbone.named_buffers())


def test_hessian_products_are_differences_of_gradients() -> None:
    torch.manual_seed(0)
    # Of a network with hard sigmoids, and with norms that hold their activations.
    backbone = made("mobilenetv3_small_050", 32).double().train()
    images = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    point = {key: value.detach().requires_grad_() for key, value in backbone.named_parameters()}
    direction = {key: torch.randn_like(value) for key, value in point.items()}

    def gradient(scale: float, create_graph: bool = False) -> tuple[Tensor, ...]:
        at = {key: value + scale * direction[key] for key, value in point.items()} if scale else point
        with curvature_pass(seed=0):
            loss = functional_call(backbone, at, (images,)).square().mean()
        return torch.autograd.grad(loss, list(point.values()), create_graph=create_graph)

    pairs = zip(gradient(0.0, True), direction.values(), strict=True)
    along = torch.stack([(value * other).sum() for value, other in pairs]).sum()
    products = torch.cat([p.flatten() for p in torch.autograd.grad(along, list(point.values()))])
    # A step far below the distance to the nearest kink.
    up, down = (torch.cat([g.flatten() for g in gradient(step)]) for step in (1e-8, -1e-8))
    differences = (up - down) / 2e-8
    assert torch.linalg.vector_norm(products - differences) < 1e-4 * torch.linalg.vector_norm(products)


def test_norms_with_activations_can_be_synchronised() -> None:
    torch.manual_seed(0)
    backbone = made("tinynet_e", 32)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = backbone(images)
        found = synchronised(backbone)(images)
    norms = [layer for layer in backbone.modules() if isinstance(layer, nn.BatchNorm2d | nn.SyncBatchNorm)]
    assert len(norms) > 20
    assert all(type(layer) is SyncBatchNorm for layer in norms)
    torch.testing.assert_close(found, expected)


def test_weights_depend_on_the_seed_alone() -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(made("resnet10t", 32).state_dict())
    first, second, third = states
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["network.conv1.0.weight"], third["network.conv1.0.weight"])


@pytest.mark.parametrize("prefix", ["", "module.backbone.", "backbone.network."])
def test_weights_from_a_file(prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("resnet10t").eval()
    torch.save({prefix + key: value for key, value in network.state_dict().items()}, tmp_path / "weights.pt")
    backbone = made("resnet10t", 64)
    line = load_backbone(read_weights(tmp_path / "weights.pt"), backbone, "timm:resnet10t")
    # The classifier's weight and bias are the two that are left out.
    assert f"{len(backbone.state_dict())} tensors of timm:resnet10t loaded (names: timm" in line
    assert "2 of heads" in line
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(images), pre_logits=True)
        torch.testing.assert_close(backbone.eval()(images), expected)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=r"does not fit timm:resnet10t: .*missing"):
        load_backbone(read_weights(tmp_path / "weights.pt"), made("resnet10t", 64), "timm:resnet10t")


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("resnet10", None, r"timm has no network 'resnet10'; it has .*resnet10t.*list_models"),
        ("nothing-like-it!", None, r"timm has no network 'nothing-like-it!'; python"),
        ("", None, "timm has no network ''"),
        (
            "resnet10t.c3_in1k",
            None,
            "pretrained weights, which are not downloaded; use timm:resnet10t, .*init_backbone",
        ),
        ("vit_tiny_patch16_224", 8, "timm:vit_tiny_patch16_224 does not take images of 8 px: "),
        ("vgg11", 16, "timm:vgg11 does not take images of 16 px: "),
    ],
)
def test_refused_before_anything_is_built(name: str, size: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_backbone(f"timm:{name}", size)


def test_views_of_another_size() -> None:
    check_view("timm:resnet10t", 64, 32)
    with pytest.raises(ValueError, match="_224, made for images of 64 px, does not take images of 32 px"):
        check_view("timm:vit_tiny_patch16_224", 64, 32)


def test_the_config_names_the_field() -> None:
    assert small_config("--model.backbone=timm:resnet10t").model.backbone == "timm:resnet10t"
    with pytest.raises(ConfigError, match=r"model.backbone: timm has no network 'resnet10'"):
        small_config("--model.backbone=timm:resnet10")
    with pytest.raises(ConfigError, match=r"zero_init_residual.*timm's networks start as timm makes them"):
        small_config("--model.backbone=timm:resnet10t", "--model.zero-init-residual=true")


def test_without_timm_the_command_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.chdir(tmp_path)
    assert main(["--model.backbone=timm:resnet10t", "--output-dir", "run"]) == 2
    assert (
        "model.backbone: timm:resnet10t needs the package timm: pip install 'bilevel[timm]'" in capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []
