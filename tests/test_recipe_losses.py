import math

import numpy as np
import pytest
import torch

from recipes.bissl.losses import embedding_spread, nt_xent


def views(n: int = 5, d: int = 4, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    return first, second


def double_loop(first: np.ndarray, second: np.ndarray, temperature: float) -> float:
    """The definition, anchor by anchor."""
    n = len(first)
    z = [row / math.sqrt(sum(row * row)) for row in (*first, *second)]
    total = 0.0
    for i in range(2 * n):
        similar = [math.exp(sum(z[i] * z[j]) / temperature) for j in range(2 * n) if j != i]
        positive = math.exp(sum(z[i] * z[(i + n) % (2 * n)]) / temperature)
        assert len(similar) == 2 * n - 1
        total -= math.log(positive / sum(similar))
    return total / (2 * n)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("n", [2, 7])
def test_nt_xent_is_its_definition(n: int, temperature: float) -> None:
    first, second = views(n)
    expected = double_loop(first.numpy(), second.numpy(), temperature)
    assert nt_xent(first, second, temperature=temperature).item() == pytest.approx(expected, rel=1e-12)


def test_nt_xent_has_temperature_one_half_by_default() -> None:
    first, second = views()
    assert nt_xent(first, second).item() == pytest.approx(double_loop(first.numpy(), second.numpy(), 0.5), rel=1e-12)


def test_nt_xent_of_collapsed_embeddings_is_the_logarithm_of_the_candidates() -> None:
    same = torch.ones(6, 3, dtype=torch.float64)
    assert nt_xent(same, 3 * same).item() == pytest.approx(math.log(11), rel=1e-12)


def test_nt_xent_ignores_length_and_order_of_views() -> None:
    first, second = views()
    lengths = torch.linspace(0.1, 50, 5, dtype=torch.float64)[:, None]
    torch.testing.assert_close(nt_xent(second * lengths, first), nt_xent(first, second))


def test_nt_xent_has_correct_first_and_second_derivatives() -> None:
    first, second = (x.requires_grad_() for x in views(3, 3))
    assert torch.autograd.gradcheck(nt_xent, (first, second))
    assert torch.autograd.gradgradcheck(nt_xent, (first, second))


def test_nt_xent_hessian_products_agree_between_modes() -> None:
    first, second = views()
    direction = torch.randn_like(first)
    forward_over_reverse = torch.func.jvp(torch.func.grad(lambda x: nt_xent(x, second)), (first,), (direction,))[1]
    x = first.requires_grad_()
    (gradient,) = torch.autograd.grad(nt_xent(x, second), x, create_graph=True)
    (reverse_over_reverse,) = torch.autograd.grad(gradient, x, direction)
    assert forward_over_reverse.norm() > 0
    torch.testing.assert_close(forward_over_reverse, reverse_over_reverse, rtol=1e-10, atol=1e-12)


def test_nt_xent_survives_a_zero_embedding_in_every_derivative() -> None:
    first, second = views()
    first[0] = 0
    x = first.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nt_xent(x, second), x, create_graph=True)
    (curvature,) = torch.autograd.grad(gradient.square().sum(), x)
    assert gradient.isfinite().all()
    assert curvature.isfinite().all()
    assert gradient[0].abs().max() == 0
    assert gradient[1].abs().max() > 0


def test_nt_xent_is_stable_at_low_temperature_in_single_precision() -> None:
    first, second = views(4, 8)
    expected = double_loop(first.numpy(), second.numpy(), 0.004)
    x = first.float().requires_grad_()
    loss = nt_xent(x, second.float(), temperature=0.004)
    (gradient,) = torch.autograd.grad(loss, x)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nt_xent_takes_half_precision(dtype: torch.dtype) -> None:
    first, second = (x.to(dtype).requires_grad_() for x in views())
    loss = nt_xent(first, second)
    (gradient,) = torch.autograd.grad(loss, first)
    expected = double_loop(first.detach().double().numpy(), second.detach().double().numpy(), 0.5)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nt_xent_is_single_precision_under_autocast(dtype: torch.dtype) -> None:
    first, second = (x.to(dtype) for x in views(16, 8))
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(first, second)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, nt_xent(first.float(), second.float()))


def test_nt_xent_differentiates_twice_under_autocast() -> None:
    first, second = (x.float() for x in views(16, 8))
    direction = torch.ones_like(first)

    def derivatives(*, forward: bool, backward: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x = first.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=forward):
            loss = nt_xent(x, second)
        with torch.autocast("cpu", torch.bfloat16, enabled=backward):
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            return gradient.detach(), torch.autograd.grad(gradient, x, direction)[0]

    expected = derivatives(forward=False, backward=False)
    assert all(map(torch.equal, derivatives(forward=True, backward=False), expected))
    # torch runs a backward pass under the autocast of its caller.
    with torch.autocast("cpu", torch.bfloat16):
        transformed = torch.func.jvp(torch.func.grad(lambda x: nt_xent(x, second)), (first,), (direction,))
    for found in (derivatives(forward=True, backward=True), transformed):
        for value, reference in zip(found, expected, strict=True):
            assert (value - reference).norm() <= 2e-2 * reference.norm()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nt_xent_does_not_hide_what_is_not_finite(bad: float) -> None:
    first, second = views()
    first[0, 0] = bad
    assert nt_xent(first, second).isnan()


@pytest.mark.parametrize(
    ("shapes", "temperature", "message"),
    [
        (((3, 4), (3, 5)), 0.5, r"\(3, 4\) and \(3, 5\)"),
        (((3, 4), (2, 4)), 0.5, "one shape"),
        (((1, 4), (1, 4)), 0.5, "no negatives"),
        (((3,), (3,)), 0.5, "one shape"),
        (((3, 4), (3, 4)), 0.0, "temperature"),
        (((3, 4), (3, 4)), -1.0, "temperature"),
        (((3, 4), (3, 4)), math.nan, "temperature"),
    ],
)
def test_nt_xent_refuses(shapes: tuple[tuple[int, ...], ...], temperature: float, message: str) -> None:
    first, second = (torch.ones(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        nt_xent(first, second, temperature=temperature)


def test_embedding_spread_of_known_arrangements() -> None:
    axes = torch.eye(4, dtype=torch.float64)
    assert embedding_spread(torch.cat([axes, -5 * axes])) == pytest.approx(1.0)
    assert embedding_spread(torch.ones(9, 4)) == pytest.approx(0.0, abs=1e-6)
    # Four unit vectors: each coordinate has mean 1/4 and mean square 1/4, so its deviation is sqrt(3/16).
    assert embedding_spread(2 * axes) == pytest.approx(2 * math.sqrt(3 / 16))


def test_embedding_spread_is_its_formula() -> None:
    x = np.random.default_rng(0).normal(size=(50, 6)) + 0.3
    z = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert embedding_spread(torch.from_numpy(x)) == pytest.approx(np.sqrt(6) * z.std(axis=0).mean())


def test_embedding_spread_needs_two_rows() -> None:
    with pytest.raises(ValueError, match=r"\[N, d\]"):
        embedding_spread(torch.ones(1, 4))
