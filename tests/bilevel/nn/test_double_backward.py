"""Cheap double backward against torch's own, through numerical derivatives and whole networks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bilevel import Params, functional_call, tree
from bilevel.nn.double_backward import CheapDoubleBackward
from bilevel.nn.functional import curvature_pass
from bilevel.products import FiniteDifference, ForwardOverReverse, ReverseOverReverse

Function = Callable[..., Tensor]

CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Function]] = {
    "plain": ((2, 2, 4, 4), (2, 2, 3, 3), functional.conv2d),
    "stride and padding": (
        (2, 2, 5, 4),
        (2, 2, 3, 2),
        lambda x, w: functional.conv2d(x, w, stride=2, padding=(1, 0)),
    ),
    "groups and dilation": (
        (1, 4, 4, 4),
        (4, 2, 2, 2),
        lambda x, w: functional.conv2d(x, w, groups=2, dilation=2, padding=1),
    ),
    "bias": ((1, 1, 3, 3), (2, 1, 2, 2), lambda x, w: functional.conv2d(x, w, w.sum((1, 2, 3)), [1], [1])),
}


def tensor(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)


def cheap(function: Function) -> Function:
    def inside(*args: Tensor) -> Tensor:
        with CheapDoubleBackward():
            return function(*args)

    return inside


def node(output: Tensor) -> str:
    return type(output.grad_fn).__name__


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_by_numerical_derivatives(name: str) -> None:
    x_shape, w_shape, function = CONVOLUTIONS[name]
    x, w = tensor(x_shape, 0), tensor(w_shape, 1)
    inside = cheap(function)
    torch.testing.assert_close(inside(x, w), function(x, w))
    assert torch.autograd.gradcheck(inside, (x, w))
    assert torch.autograd.gradgradcheck(inside, (x, w))


@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 4), (3, 2, 2, 3)], ids=str)
def test_batch_norm_by_numerical_derivatives(shape: tuple[int, ...]) -> None:
    x, w, b = tensor(shape, 0), tensor(shape[1:2], 1), tensor(shape[1:2], 2)
    inside = cheap(lambda x, w, b: functional.batch_norm(x, None, None, w, b, training=True, eps=0.1))
    assert node(inside(x, w, b)) == "_BatchNormBackward"
    torch.testing.assert_close(inside(x, w, b), functional.batch_norm(x, None, None, w, b, training=True, eps=0.1))
    assert torch.autograd.gradcheck(inside, (x, w, b))
    assert torch.autograd.gradgradcheck(inside, (x, w, b))


def test_products_on_a_network_are_those_of_forward_mode() -> None:
    """Forward-over-reverse differentiates torch's own layers."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Tanh()),
        *(nn.Conv2d(4, 6, 3, stride=2, padding="valid"), nn.ReLU(inplace=True), nn.Flatten()),
        *(nn.LazyLinear(5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3), nn.BatchNorm1d(3)),
    ).double()
    images = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    net(images)
    lower = {name: p.detach() for name, p in net.named_parameters()}

    def objective(upper: Params, lower: Params) -> Tensor:
        with curvature_pass(0):
            return functional_call(net, lower, images).exp().mean()

    vector = {name: torch.randn_like(leaf) for name, leaf in lower.items()}
    reference = ForwardOverReverse().linearize(objective, {}, lower).hessian(vector)
    for provider in (ReverseOverReverse(), ReverseOverReverse(keep_graph=True)):
        found = provider.linearize(objective, {}, lower).hessian(vector)
        assert float(tree.norm(tree.sub(found, reference))) <= 1e-12 * float(tree.norm(reference))


def test_everything_else_is_left_to_torch() -> None:
    x, w = tensor((4, 3, 5, 5), 0), tensor((2, 3, 3, 3), 1)
    ones = torch.ones(3, dtype=torch.float64)
    with CheapDoubleBackward():
        assert node(functional.conv2d(x, w)) == "_ConvolutionBackward"
        assert node(functional.conv2d(x, w, padding="same")) == "ConvolutionBackward0"
        assert node(functional.conv2d(x[0], w)) != "_ConvolutionBackward"
        assert node(functional.conv2d(x.bfloat16(), w.bfloat16())) == "ConvolutionBackward0"
        with torch.autocast("cpu", torch.bfloat16):
            assert functional.conv2d(x.float(), w.float()).dtype == torch.bfloat16
        assert node(functional.batch_norm(x, ones.clone(), ones.clone(), ones, ones)) != "_BatchNormBackward"
        assert node(functional.batch_norm(x, None, None, training=True)) != "_BatchNormBackward"
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            functional.batch_norm(x[:1, :, 0, 0], None, None, ones, ones, training=True)


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1), ()], ids=str)
def test_biases_of_another_shape_are_refused_as_by_torch(shape: tuple[int, ...]) -> None:
    x, w, bias = tensor((1, 1, 3, 3), 0), tensor((2, 1, 2, 2), 1), tensor(shape, 2)
    for function in (functional.conv2d, cheap(functional.conv2d)):
        with pytest.raises(RuntimeError, match="bias"):
            function(x, w, bias)


def test_biases_of_another_dtype_are_refused_as_by_torch() -> None:
    x, w, bias = tensor((1, 1, 3, 3), 0).float(), tensor((2, 1, 2, 2), 1).float(), tensor((2,), 2)
    for function in (functional.conv2d, cheap(functional.conv2d)):
        with pytest.raises(RuntimeError, match="type"):
            function(x, w, bias)
    assert node(cheap(functional.conv2d)(x, w, bias.float())) == "AddBackward0"


def third(value: Tensor, variables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    for _ in range(2):
        slopes = torch.autograd.grad(value, variables, create_graph=True)
        value = torch.stack([slope.square().sum() for slope in slopes]).sum()
    return torch.autograd.grad(value, variables)


def test_third_derivatives_are_those_of_torch() -> None:
    variables = tensor((3, 2, 4, 4), 0), tensor((2, 2, 2, 2), 1)
    inside = cheap(functional.conv2d)(*variables)
    outside = functional.conv2d(*variables)
    for found, expected in zip(
        third(inside.exp().sum(), variables), third(outside.exp().sum(), variables), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))


def normalised(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Batch normalisation from elementary operations, of which torch has derivatives of every order."""
    variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0, keepdim=True)
    return (x - mean) / (variance + 0.1).sqrt() * w.view(mean.shape) + b.view(mean.shape)


@pytest.mark.parametrize("shape", [(5, 2), (3, 2, 2, 3)], ids=str)
def test_higher_derivatives_of_batch_norm_are_those_of_its_definition(shape: tuple[int, ...]) -> None:
    variables = tensor(shape, 0), tensor((2,), 1), tensor((2,), 2)

    def second(value: Tensor, variables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        slopes = torch.autograd.grad(value, variables, create_graph=True)
        square = torch.stack([slope.square().sum() for slope in slopes]).sum()
        return torch.autograd.grad(square, variables, create_graph=True)

    inside = cheap(lambda x, w, b: functional.batch_norm(x, None, None, w, b, training=True, eps=0.1))(*variables)
    assert node(inside) == "_BatchNormBackward"
    expected = normalised(*variables)
    for order in (second, third):
        for found, wanted in zip(
            order(inside.exp().sum(), variables), order(expected.exp().sum(), variables), strict=True
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8 * float(wanted.detach().abs().max()))


def test_objectives_with_transforms_of_their_own() -> None:
    x, w = tensor((3, 2, 4, 4), 0).detach(), tensor((2, 2, 2, 2), 1).detach()
    ones, zeros = torch.ones(2).double(), torch.zeros(2).double()

    def net(x: Tensor, w: Tensor) -> Tensor:
        return functional.batch_norm(functional.conv2d(x, w), None, None, ones, zeros, training=True).exp().sum()

    def objective(upper: Params, lower: Params) -> Tensor:
        w = lower["w"]
        slope = torch.func.grad(lambda x: functional.conv2d(x, w).exp().sum())(x).square().sum()
        vmapped = torch.func.vmap(lambda scale: functional.conv2d(scale * x, w).exp().sum())(ones).sum()
        pushed = torch.func.jvp(lambda x: functional.conv2d(x, w).exp().sum(), (x,), (x,))[1]
        # Inside a transform, of tensors that it does not concern.
        beside = torch.func.vmap(lambda scale: scale * net(x, w))(ones).sum()
        return slope + vmapped + pushed + beside

    direction = {"w": torch.ones_like(w)}
    found, expected = (
        provider.linearize(objective, {}, {"w": w}).hessian(direction)["w"]
        for provider in (ReverseOverReverse(), FiniteDifference())
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
