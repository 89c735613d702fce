import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from recipes.vision.losses import cosine_distance, embedding_spread, nt_xent, vicreg

PairLoss = Callable[..., torch.Tensor]


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


def test_cosine_distance_is_its_definition() -> None:
    first, second = views()
    rows = [u / np.linalg.norm(u) - v / np.linalg.norm(v) for u, v in zip(first.numpy(), second.numpy(), strict=True)]
    expected = sum(float(row @ row) for row in rows) / len(rows)
    assert cosine_distance(first, second).item() == pytest.approx(expected, rel=1e-12)
    lengths = torch.linspace(0.1, 50, 5, dtype=torch.float64)[:, None]
    assert cosine_distance(lengths * first, second).item() == pytest.approx(expected, rel=1e-12)
    assert cosine_distance(first, 3 * first).item() == pytest.approx(0, abs=1e-12)
    assert cosine_distance(first, -first).item() == pytest.approx(4, rel=1e-12)


def vicreg_loop(first: np.ndarray, second: np.ndarray, weights: tuple[float, float, float]) -> float:
    """The definition, number by number."""
    n, d = first.shape
    invariance = sum((first[i, k] - second[i, k]) ** 2 for i in range(n) for k in range(d)) / (n * d)
    variance = covariance = 0.0
    for z in (first, second):
        mean = [sum(z[:, k]) / n for k in range(d)]
        for k in range(d):
            for m in range(d):
                c = sum((z[i, k] - mean[k]) * (z[i, m] - mean[m]) for i in range(n)) / (n - 1)
                if k == m:
                    variance += max(0.0, 1 - math.sqrt(c + 1e-4)) / d
                else:
                    covariance += c**2 / d
    return weights[0] * invariance + weights[1] * variance + weights[2] * covariance


@pytest.mark.parametrize("weights", [(25.0, 25.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)], ids=str)
@pytest.mark.parametrize("n", [2, 9])
def test_vicreg_is_its_definition(n: int, weights: tuple[float, float, float]) -> None:
    scales = torch.tensor([0.2, 0.9, 1.5, 3.0], dtype=torch.float64)
    first, second = (scales * x + 2 for x in views(n))
    value = vicreg(first, second, invariance=weights[0], variance=weights[1], covariance=weights[2])
    expected = vicreg_loop(first.numpy(), second.numpy(), weights)
    assert expected > 0
    assert value.item() == pytest.approx(expected, rel=1e-11)


def test_vicreg_has_the_published_weights_by_default() -> None:
    first, second = views()
    expected = vicreg_loop(first.numpy(), second.numpy(), (25.0, 25.0, 1.0))
    assert vicreg(first, second).item() == pytest.approx(expected, rel=1e-12)


def test_vicreg_of_collapsed_embeddings_is_both_hinges() -> None:
    # Standard deviation sqrt(1e-4) in both views: 25 (0.99 + 0.99).
    same = torch.full((6, 3), 7.0, dtype=torch.float64)
    assert vicreg(same, same).item() == pytest.approx(49.5, rel=1e-12)


PAIR_LOSSES = [cosine_distance, vicreg]


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_pair_losses_have_correct_first_and_second_derivatives(loss: PairLoss) -> None:
    # Half as spread as the hinge asks for, and away from its kink.
    first, second = ((0.5 * x).requires_grad_() for x in views(4, 3))
    assert torch.autograd.gradcheck(loss, (first, second))
    assert torch.autograd.gradgradcheck(loss, (first, second))
    assert torch.autograd.gradcheck(loss, (first, second), check_forward_ad=True)


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_pair_losses_products_agree_between_modes(loss: PairLoss) -> None:
    first, second = views()
    direction = torch.randn(first.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    forward_over_reverse = torch.func.jvp(torch.func.grad(lambda x: loss(x, second)), (first,), (direction,))[1]
    x = first.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x, second), x, create_graph=True)
    (reverse_over_reverse,) = torch.autograd.grad(gradient, x, direction)
    assert forward_over_reverse.norm() > 0
    torch.testing.assert_close(forward_over_reverse, reverse_over_reverse, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", PAIR_LOSSES)
@pytest.mark.parametrize(
    "degenerate", ["a zero row", "all rows equal", "all rows zero", "a constant column", "views equal"]
)
def test_pair_losses_survive_degenerate_embeddings_in_every_derivative(loss: PairLoss, degenerate: str) -> None:
    first, second = views()
    if degenerate == "a zero row":
        first[0] = 0
    elif degenerate == "all rows equal":
        first[:] = first[0].clone()
    elif degenerate == "all rows zero":
        first[:] = 0
    elif degenerate == "a constant column":
        first[:, 1] = 3
    else:
        second = first.clone()
    x, y = first.requires_grad_(), second.requires_grad_()
    gradients = torch.autograd.grad(loss(x, y), (x, y), create_graph=True)
    curvatures = torch.autograd.grad(sum(g.square().sum() for g in gradients), (x, y))  # type: ignore[arg-type]
    assert all(tensor.isfinite().all() for tensor in (*gradients, *curvatures))


def test_cosine_distance_gives_an_embedding_without_direction_no_gradient() -> None:
    first, second = views()
    first[0] = 0
    x = first.requires_grad_()
    value = cosine_distance(x, second)
    (gradient,) = torch.autograd.grad(value, x)
    assert gradient[0].abs().max() == 0
    assert gradient[1].abs().max() > 0
    others = cosine_distance(first.detach()[1:], second[1:])
    assert value.item() == pytest.approx((2 + 4 * others.item()) / 5, rel=1e-12)


@pytest.mark.parametrize("loss", PAIR_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_pair_losses_compare_half_precision_in_single(loss: PairLoss, dtype: torch.dtype) -> None:
    first, second = (x.to(dtype).requires_grad_() for x in views(16, 8))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(first, second)
    (gradient,) = torch.autograd.grad(value, first)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(first.detach().double(), second.detach().double()).item(), rel=1e-4)
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_pair_losses_refuse(loss: PairLoss) -> None:
    for shapes in (((3, 4), (3, 5)), ((3, 4), (2, 4)), ((3,), (3,)), ((0, 4), (0, 4))):
        with pytest.raises(ValueError, match="one shape"):
            loss(*(torch.ones(shape) for shape in shapes))


def test_vicreg_refuses() -> None:
    one, two = torch.ones(1, 4), torch.ones(2, 4)
    with pytest.raises(ValueError, match="the variance of a single example is undefined"):
        vicreg(one, one)
    for name in ("invariance", "variance", "covariance"):
        for weight in (-1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match=f"{name} must be a finite number of at least 0"):
                vicreg(two, two, **{name: weight})
