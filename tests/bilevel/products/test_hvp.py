"""Products of every provider against dense second derivatives."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bilevel import Params, functional_call, tree
from bilevel.nn.functional import curvature_pass
from bilevel.products import FiniteDifference, ForwardOverReverse, HVPProvider, ReverseOverReverse
from bilevel.products.hvp import Linearization
from tests.support.cases import joined, vector

EXACT = [ReverseOverReverse(), ReverseOverReverse(keep_graph=True), ForwardOverReverse()]
ALL: list[HVPProvider] = [*EXACT, FiniteDifference(), FiniteDifference(step=1e-5), FiniteDifference(central=False)]
TOLERANCE = {True: 1e-12, False: 2e-6}

LOWER: Params = {
    "weight": vector(6, 0).reshape(2, 3),
    "unused": vector(2, 1),
    "scalar": vector(1, 2)[0],
    "empty": vector(0),
}
UPPER: Params = {"rate": vector(1, 3)[0], "shift": vector(3, 4), "idle": vector(2, 5)}


def loss(upper: Params, lower: Params) -> Tensor:
    hidden = torch.tanh(lower["weight"] * torch.exp(0.3 * upper["rate"]) + upper["shift"])
    return (hidden.sum(dim=1).square() * torch.sigmoid(lower["scalar"])).sum() + 0.5 * (lower["weight"] ** 4).sum()


def split(flat: Tensor, like: Params) -> Params:
    parts = flat.split([leaf.numel() for leaf in like.values()])
    return {name: part.reshape(leaf.shape) for (name, leaf), part in zip(like.items(), parts, strict=True)}


def second_derivatives(function: Callable[[Params, Params], Tensor], upper: Params) -> tuple[Tensor, Tensor]:
    """(d2L/dydy, d2L/dxdy) as dense matrices."""
    n, whole = joined(LOWER).numel(), torch.cat([joined(LOWER), joined(upper)])

    def flat(z: Tensor) -> Tensor:
        return function(split(z[n:], upper), split(z[:n], LOWER))

    hessian = torch.autograd.functional.hessian(flat, whole)
    assert isinstance(hessian, Tensor)
    return hessian[:n, :n], hessian[n:, :n]


HESSIAN, CROSS = second_derivatives(loss, UPPER)


def close(found: Params, reference: Tensor, provider: HVPProvider) -> None:
    assert not any(leaf.requires_grad for leaf in found.values())
    torch.testing.assert_close(joined(found), reference, rtol=0.0, atol=TOLERANCE[provider.exact])


@pytest.mark.parametrize("provider", ALL, ids=str)
def test_products_are_those_of_dense_derivatives(provider: HVPProvider) -> None:
    linearization = provider.linearize(loss, UPPER, LOWER)
    for seed in range(3):
        w = vector(joined(LOWER).numel(), 10 + seed)
        close(linearization.hessian(split(w, LOWER)), HESSIAN @ w, provider)
        close(linearization.cross(split(w, LOWER), UPPER), CROSS @ w, provider)
    first = torch.autograd.functional.jacobian(lambda y: loss(UPPER, split(y, LOWER)), joined(LOWER))
    assert isinstance(first, Tensor)
    torch.testing.assert_close(joined(linearization.gradient()), first)
    assert not linearization.gradient()["unused"].any()


@pytest.mark.parametrize("provider", ALL, ids=str)
def test_products_do_not_depend_on_the_grad_mode_around_them(provider: HVPProvider) -> None:
    w = vector(joined(LOWER).numel(), 10)
    with torch.no_grad():
        linearization = provider.linearize(loss, UPPER, LOWER)
        close(linearization.hessian(split(w, LOWER)), HESSIAN @ w, provider)
        close(linearization.cross(split(w, LOWER), UPPER), CROSS @ w, provider)
        assert linearization.reached_upper() == {"rate", "shift"}
        assert linearization.gradient()["weight"].any()


@pytest.mark.parametrize("provider", ALL, ids=str)
def test_cross_and_gradient_at_other_upper_values(provider: HVPProvider) -> None:
    linearization = provider.linearize(loss, UPPER, LOWER)
    moved = {name: leaf + 0.5 for name, leaf in UPPER.items()}
    w = vector(joined(LOWER).numel(), 10)
    close(linearization.cross(split(w, LOWER), moved), second_derivatives(loss, moved)[1] @ w, provider)
    first = torch.autograd.functional.jacobian(lambda y: loss(moved, split(y, LOWER)), joined(LOWER))
    assert isinstance(first, Tensor)
    torch.testing.assert_close(joined(linearization.gradient_at(moved)), first)


@pytest.mark.parametrize("provider", ALL, ids=str)
@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: torch.zeros((), dtype=torch.float64),
        lambda x, y: x["rate"] * x["shift"].sum(),
        lambda x, y: y["scalar"],
        lambda x, y: y["weight"].sum() * x["rate"],
    ],
    ids=["constant", "upper only", "linear", "bilinear"],
)
def test_derivatives_that_vanish_are_zero_and_no_error(
    function: Callable[[Params, Params], Tensor], provider: HVPProvider
) -> None:
    linearization = provider.linearize(function, UPPER, LOWER)
    hessian, cross = second_derivatives(lambda x, y: function(x, y) + 0.0 * (joined(x).sum() + joined(y).sum()), UPPER)
    w = vector(joined(LOWER).numel(), 10)
    close(linearization.hessian(split(w, LOWER)), hessian @ w, provider)
    close(linearization.cross(split(w, LOWER), UPPER), cross @ w, provider)


def test_which_upper_variables_the_loss_reaches() -> None:
    def found(function: Callable[[Params, Params], Tensor], upper: Params) -> set[str]:
        return ReverseOverReverse().linearize(function, upper, LOWER).reached_upper()

    assert found(loss, UPPER) == {"rate", "shift"}
    assert not found(lambda x, y: y["scalar"], {})
    assert not found(lambda x, y: y["scalar"] ** 2, UPPER)
    assert not found(lambda x, y: y["scalar"] * x["shift"].detach().sum(), UPPER)


@pytest.mark.parametrize("provider", EXACT, ids=str)
def test_a_nan_stays_a_nan(provider: HVPProvider) -> None:
    linearization = provider.linearize(lambda x, y: loss(x, y) * torch.nan, UPPER, LOWER)
    assert joined(linearization.hessian(LOWER)).isnan().any()
    assert joined(linearization.cross(LOWER, UPPER)).isnan().any()


def counted(provider: HVPProvider) -> tuple[Linearization, list[int]]:
    calls = [0]

    def objective(upper: Params, lower: Params) -> Tensor:
        calls[0] += 1
        return loss(upper, lower)

    return provider.linearize(objective, UPPER, LOWER), calls


@pytest.mark.parametrize(
    ("provider", "after_products", "after_gradient"),
    [
        (ReverseOverReverse(), 3, 3),
        (ReverseOverReverse(keep_graph=True), 1, 1),
        (ForwardOverReverse(), 3, 3),
        (FiniteDifference(), 6, 7),
        (FiniteDifference(central=False), 4, 4),
    ],
    ids=str,
)
def test_cost_in_forward_passes(provider: HVPProvider, after_products: int, after_gradient: int) -> None:
    linearization, calls = counted(provider)
    assert calls == [0]
    for seed in range(3):
        linearization.hessian(split(vector(joined(LOWER).numel(), seed), LOWER))
    assert calls == [after_products]
    linearization.gradient()
    linearization.gradient()
    assert calls == [after_gradient]


@pytest.mark.parametrize("central", [True, False])
def test_differences_of_very_short_and_long_vectors(central: bool) -> None:
    lower = {name: leaf.float() for name, leaf in LOWER.items()}
    upper = {name: leaf.float() for name, leaf in UPPER.items()}
    linearization = FiniteDifference(central=central).linearize(loss, upper, lower)
    w = vector(joined(LOWER).numel(), 10).float()
    one = joined(linearization.hessian(split(w, lower)))
    cross = joined(linearization.cross(split(w, lower), upper))
    for factor in (2.0**-90, 2.0**90):
        assert torch.equal(joined(linearization.hessian(split(w * factor, lower))), one * factor)
        assert torch.equal(joined(linearization.cross(split(w * factor, lower), upper)), cross * factor)
    nothing = split(torch.zeros_like(w), lower)
    assert not joined(linearization.hessian(nothing)).any()
    assert {n: t.shape for n, t in linearization.cross(nothing, upper).items()} == {
        n: t.shape for n, t in upper.items()
    }


def test_difference_steps_have_the_length_that_was_asked_for() -> None:
    points: list[Tensor] = []

    def objective(upper: Params, lower: Params) -> Tensor:
        points.append(joined(tree.detach(lower)))
        return loss(upper, lower)

    FiniteDifference(step=0.25).linearize(objective, UPPER, LOWER).hessian(LOWER)
    assert [float((p - joined(LOWER)).norm()) for p in points] == pytest.approx([0.25, 0.25], rel=1e-12)
    torch.testing.assert_close((points[0] + points[1]) / 2, joined(LOWER))


@pytest.mark.parametrize("provider", EXACT, ids=str)
def test_gradients_and_products_see_the_same_random_masks(provider: HVPProvider) -> None:
    # Attention lays its activations out otherwise than their indices say, which is the order that dropout goes by.
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True, activation=torch.tanh).double()
    lower = {name: vector(p.numel(), k).reshape(p.shape) for k, (name, p) in enumerate(layer.named_parameters())}
    tokens = vector(2 * 5 * 8, 99).reshape(2, 5, 8)

    def objective(upper: Params, lower: Params) -> Tensor:
        with curvature_pass(seed=7):
            return functional_call(layer, lower, tokens).sin().mean() * upper["rate"].exp()

    w, step = split(vector(joined(lower).numel(), 98), lower), 1e-5
    linearization = provider.linearize(objective, UPPER, lower)
    before, product = linearization.gradient_at(UPPER), linearization.hessian(w)
    # The gradient that the product has met on its way.
    torch.testing.assert_close(joined(linearization.gradient()), joined(before), rtol=0.0, atol=1e-12)
    ahead, behind = (
        joined(provider.linearize(objective, UPPER, tree.axpy(h, w, lower)).gradient()) for h in (step, -step)
    )
    torch.testing.assert_close((ahead - behind) / (2.0 * step), joined(product), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step", [0.0, -1.0])
def test_a_bad_step_is_refused(step: float) -> None:
    with pytest.raises(ValueError, match="FiniteDifference: step"):
        FiniteDifference(step=step)


def test_only_differences_are_inexact() -> None:
    assert [provider.exact for provider in ALL] == [True, True, True, False, False, False]
