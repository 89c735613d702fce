import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from recipes.vision.networks.backbones import (
    BACKBONES,
    ResidualBlock,
    ResNetBackbone,
    SmallResNet,
    build_backbone,
    check_residual,
    linear_head,
    projector,
)

STRIDES = {"resnet18": 32, "resnet50": 32, "resnet18-cifar": 8, "resnet-small": 4, "resnet-tiny": 4}
FEATURES = {"resnet18": 512, "resnet50": 2048, "resnet18-cifar": 512, "resnet-small": 128, "resnet-tiny": 64}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def stateless_norms(module: nn.Module) -> nn.Module:
    """Train-mode normalisation on batch statistics only, so that a function of the parameters has no side effect."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    return module


def test_every_named_backbone_is_covered_here() -> None:
    assert set(BACKBONES) == set(FEATURES)


@pytest.mark.parametrize("name", sorted(FEATURES))
def test_shapes(name: str) -> None:
    backbone = build_backbone(name).eval()
    assert backbone.num_features == FEATURES[name]
    for size in (8, 32) if name == "resnet50" else (8, 32, 96):
        images = torch.randn(2, 3, size, size)
        with torch.no_grad():
            features = backbone(images)
            feature_map = backbone(images, feature_map=True)
        side = -(-size // STRIDES[name])
        assert features.shape == (2, FEATURES[name])
        assert feature_map.shape == (2, FEATURES[name], side, side)
        torch.testing.assert_close(features, feature_map.flatten(2).mean(dim=2))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_weights_load_into_torchvision_and_compute_the_same(name: str) -> None:
    backbone = ResNetBackbone(name)
    theirs = torchvision.models.get_model(name, weights=None)
    report = theirs.load_state_dict(backbone.state_dict(), strict=False)
    assert sorted(report.missing_keys) == ["fc.bias", "fc.weight"]
    assert report.unexpected_keys == []
    theirs.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone.train()(images), theirs.train()(images))
        torch.testing.assert_close(backbone.eval()(images), theirs.eval()(images))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("before", "width", "stride"), [(5, 5, 1), (5, 5, 2), (4, 6, 1), (4, 6, 2)])
def test_a_residual_block_is_torchvisions_to_the_bit(before: int, width: int, stride: int, dtype: torch.dtype) -> None:
    plain = stride == 1 and before == width

    def made(kind: Callable[..., nn.Module]) -> nn.Module:
        torch.manual_seed(3)
        shortcut = None if plain else nn.Sequential(nn.Conv2d(before, width, 1, stride), nn.BatchNorm2d(width))
        # Layers on both sides, whose second derivatives are sums over the ways through the block.
        block = kind(before, width, stride, shortcut)
        return nn.Sequential(nn.Conv2d(before, before, 3), block, kind(width, width), nn.Conv2d(width, 2, 1)).to(dtype)

    ours, theirs = made(ResidualBlock), made(BasicBlock)
    images = torch.randn(8, before, 17, 18, dtype=dtype)
    for mode in (True, False):
        results = []
        for block in (ours.train(mode), theirs.train(mode)):
            out = block(images)
            gradients = torch.autograd.grad(out.square().sum(), list(block.parameters()), create_graph=True)
            second = torch.autograd.grad(
                torch.stack([g.square().sum() for g in gradients]).sum(), list(block.parameters())
            )
            results.append([out, *gradients, *second])
        assert all(map(torch.equal, *results))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


def test_resnet18_has_the_published_number_of_parameters() -> None:
    # torchvision documents 11,689,512 with the classifier, which has 512 x 1000 weights and 1000 biases.
    assert count(build_backbone("resnet18")) == 11_689_512 - 513_000 == 11_176_512


def test_small_resnet_has_the_parameters_of_its_layers() -> None:
    def block(before: int, width: int) -> int:
        shortcut = 0 if before == width else before * width + 2 * width
        return 9 * before * width + 2 * width + 9 * width * width + 2 * width + shortcut

    stem = 27 * 16 + 2 * 16
    assert count(SmallResNet((16, 32, 64))) == stem + block(16, 16) + block(16, 32) + block(32, 64)
    assert count(SmallResNet((16, 32), blocks=2)) == stem + 2 * block(16, 16) + block(16, 32) + block(32, 32)


def test_the_small_stem_keeps_the_resolution() -> None:
    backbone = ResNetBackbone("resnet18", small_images=True)
    assert backbone.conv1.weight.shape == (64, 3, 3, 3)
    assert backbone.maxpool(backbone.conv1(torch.randn(1, 3, 32, 32))).shape == (1, 64, 32, 32)


@pytest.mark.parametrize("name", ["resnet18-cifar", "resnet-tiny"])
def test_the_callers_seed_decides_the_weights(name: str) -> None:
    torch.manual_seed(5)
    first = build_backbone(name).state_dict()
    torch.manual_seed(5)
    second = build_backbone(name).state_dict()
    torch.manual_seed(6)
    third = build_backbone(name).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["conv1.weight"], third["conv1.weight"])


@pytest.mark.parametrize("name", [*BACKBONES, "resnet34", "resnet101", "resnext50_32x4d", "wide_resnet50_2"])
def test_zero_initialised_blocks_start_as_their_shortcuts(name: str) -> None:
    torch.manual_seed(5)
    plain = build_backbone(name).state_dict()
    torch.manual_seed(5)
    backbone = build_backbone(name, zero_init_residual=True)
    kinds = (BasicBlock, Bottleneck, ResidualBlock)
    blocks = [(key, block) for key, block in backbone.named_modules() if isinstance(block, kinds)]
    last = {f"{key}.{'bn3' if isinstance(block, Bottleneck) else 'bn2'}.weight" for key, block in blocks}
    assert blocks
    # Nothing else differs, so that no random number was drawn for it.
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, torch.zeros_like(value) if key in last else plain[key]), key
    _, block = blocks[-1]
    images = torch.randn(2, block.conv1.in_channels, 8, 8)
    block.eval()
    shortcut = images if block.downsample is None else block.downsample(images)
    assert torch.equal(block(images), shortcut.relu())


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_zero_initialised_norms_are_those_of_timm(name: str) -> None:
    timm = pytest.importorskip("timm", reason="timm's networks are in the extra timm")

    def zeros(network: nn.Module) -> set[str]:
        norms = {key for key, layer in network.named_modules() if isinstance(layer, nn.BatchNorm2d)}
        return {key for key in norms if not network.get_submodule(key).weight.any()}  # type: ignore[operator]

    assert zeros(build_backbone(name, zero_init_residual=True)) == zeros(timm.create_model(name)) != set()
    assert zeros(build_backbone(name)) == set()


@pytest.mark.parametrize("name", ["vit_b_16", "mobilenet_v3_small", "densenet121", "tests.support.recipes.none:Own"])
def test_zero_initialisation_is_for_residual_networks(name: str) -> None:
    with pytest.raises(ValueError, match=rf"zero_init_residual is for residual networks, resnet18, .*{name!r} is none"):
        check_residual(name)


def test_projector_has_the_layers_of_the_paper() -> None:
    head = projector(512)
    kinds = [type(layer) for layer in head]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert [layer.weight.shape for layer in head if isinstance(layer, nn.Linear)] == [
        (256, 512),
        (256, 256),
        (256, 256),
    ]
    assert count(head) == (512 + 1) * 256 + 2 * (256 + 1) * 256 + 2 * 2 * 256
    assert count(projector(512, last_bias=False)) == count(head) - 256
    assert head(torch.randn(4, 512)).shape == (4, 256)
    assert [type(layer) for layer in projector(8, (3,))] == [nn.Linear]


def test_linear_head() -> None:
    assert linear_head(7, 3)(torch.randn(2, 7)).shape == (2, 3)


@pytest.mark.parametrize("name", ["resnet18", "resnet-tiny"])
def test_train_mode_differentiates_twice_in_both_modes(name: str) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(name)
    network = stateless_norms(nn.Sequential(backbone, projector(backbone.num_features, (8, 8)))).double().train()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    point = {key: value.detach().clone() for key, value in network.named_parameters()}
    direction = {key: torch.randn_like(value) for key, value in point.items()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(network, parameters, (images,)).square().sum()

    forward = torch.func.jvp(torch.func.grad(loss), (point,), (direction,))[1]
    reverse = hessian_product(network, images, direction)
    out_of_place = copy.deepcopy(network)
    for layer in out_of_place.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    reference = hessian_product(out_of_place, images, direction)
    scale = max(value.norm() for value in reference.values())
    for key, value in reference.items():
        assert (forward[key] - value).norm() <= 1e-11 * scale, key
        assert (reverse[key] - value).norm() <= 1e-11 * scale, key


def test_hessian_products_agree_with_differences_of_gradients() -> None:
    torch.manual_seed(0)
    network = stateless_norms(SmallResNet((4, 8))).double().train()
    images = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    point = {key: value.detach().clone() for key, value in network.named_parameters()}
    direction = {key: torch.randn_like(value) for key, value in point.items()}
    product = hessian_product(network, images, direction)
    # A step far below the distance to the nearest ReLU kink.
    step, gradients = 1e-7, []
    for sign in (1, -1):
        network.load_state_dict({key: value + sign * step * direction[key] for key, value in point.items()})
        gradients.append(torch.autograd.grad(network(images).square().sum(), list(network.parameters())))
    differences = [(up - down) / (2 * step) for up, down in zip(*gradients, strict=True)]
    scale = max(value.norm() for value in product.values())
    for value, difference in zip(product.values(), differences, strict=True):
        assert (value - difference).norm() <= 1e-6 * scale


def hessian_product(network: nn.Module, images: Tensor, direction: dict[str, Tensor]) -> dict[str, Tensor]:
    """Reverse over reverse."""
    parameters = dict(network.named_parameters())
    loss = network(images).square().sum()
    gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    along = torch.stack([(g * direction[key]).sum() for key, g in zip(parameters, gradients, strict=True)]).sum()
    return dict(zip(parameters, torch.autograd.grad(along, list(parameters.values())), strict=True))


def test_refusals_name_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'resnet19'.*resnet18.*resnet-tiny"):
        build_backbone("resnet19")
    with pytest.raises(ValueError, match=r"vit_b_16.*resnet18"):
        ResNetBackbone("vit_b_16")
    with pytest.raises(ValueError, match="widths"):
        SmallResNet(())
    with pytest.raises(ValueError, match="widths"):
        projector(4, ())
    with pytest.raises(ValueError, match="classes"):
        linear_head(4, 0)
