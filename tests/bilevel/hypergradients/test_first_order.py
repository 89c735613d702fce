"""DARTS and SAMA against their formulas, worked out by hand, and against unrolled steps."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import Hypergradient, Params, Problem, SolverError, SolverWarning, Status, hypergradient, proximal
from bilevel.hypergradients.first_order import darts_hypergradient, sama_hypergradient
from bilevel.hypergradients.torch_updates import TorchUpdate, from_optimizer
from bilevel.hypergradients.unrolled import unrolled_hypergradient
from bilevel.hypergradients.updates import AdamUpdate, SGDUpdate, State, Update
from bilevel.linear.solvers.approximate_inverse import ApproximateInverse
from bilevel.products import FiniteDifference, ForwardOverReverse, HVPProvider, ReverseOverReverse
from tests.support.cases import joined, vector

EXACT: list[HVPProvider] = [ReverseOverReverse(), ReverseOverReverse(keep_graph=True), ForwardOverReverse()]
BATCH = vector(12, 20).reshape(4, 3)
BATCHES = [BATCH, vector(12, 21).reshape(4, 3)]
UPPER_BATCH = vector(12, 22).reshape(4, 3)
RATE = 0.2


class Smooth(Problem):
    """Nothing in it is quadratic, everything is coupled; the regularizer is optional."""

    def __init__(self, weight: float) -> None:
        self.regularization_weight = weight

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        outputs = torch.tanh(batch @ lower["w"] + upper["tikhonov"].sum()) * torch.exp(
            0.5 * lower["v"].sum() * upper["t"]
        )
        return outputs.square().mean() + 0.3 * torch.cosh(lower["v"]).sum() + 0.2 * (lower["w"] ** 4).sum()

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return (batch @ lower["w"]).sin().mean() + lower["v"].prod() * upper["t"] + upper["tikhonov"].square().sum()

    def regularizer(self, upper: Params, lower: Params) -> Tensor | None:
        return proximal(upper, lower, {"w": "w"}) if self.regularization_weight else None

    def total(self, upper: Params, lower: Params, batches: list[Tensor]) -> Tensor:
        loss = torch.stack([self.lower_objective(upper, lower, batch) for batch in batches]).mean()
        return loss + 0.5 * self.regularization_weight * (lower["w"] - upper["w"]).square().sum()


def smooth(weight: float = 0.3) -> tuple[Smooth, Params, Params]:
    upper = {"w": vector(3, 10), "t": vector(1, 11)[0], "tikhonov": vector(2, 12)}
    return Smooth(weight), upper, {"w": vector(3, 13), "v": vector(2, 14)}


def leaves(x: Params) -> Params:
    return {name: leaf.clone().requires_grad_() for name, leaf in x.items()}


def gradients(value: Tensor, x: Params, **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(x.values()), allow_unused=True, materialize_grads=True, **options))


def by_hand(
    problem: Smooth, upper: Params, lower: Params, at: Params, multiplier: Params | float, batches: list[Tensor]
) -> list[Tensor]:
    """dF/dx(x, at) - cross(x, y) (multiplier * dF/dy(x, at))."""
    x, z = leaves(upper), leaves(at)
    value = problem.upper_objective(x, z, UPPER_BATCH)
    direct, v = gradients(value, x, retain_graph=True), gradients(value, z)
    x, y = leaves(upper), leaves(lower)
    g = gradients(problem.total(x, y, batches), y, create_graph=True)
    scales = list(multiplier.values()) if isinstance(multiplier, dict) else [multiplier] * len(y)
    inner = torch.stack([(slope * scale * part).sum() for slope, scale, part in zip(g, scales, v, strict=True)]).sum()
    return [whole - part for whole, part in zip(direct, gradients(inner, x), strict=True)]


def relative_error(found: Hypergradient, expected: list[Tensor]) -> float:
    reference = torch.cat([leaf.reshape(-1) for leaf in expected])
    return float((joined(found.grad) - reference).norm() / reference.norm())


def darts(problem: Problem, upper: Params, lower: Params, **options: Any) -> Hypergradient:
    options = {"upper_batch": UPPER_BATCH, "lower_batches": BATCHES, "step_size": RATE, **options}
    return darts_hypergradient(problem, upper, lower, **options)


def sama(problem: Problem, upper: Params, lower: Params, update: Update, **options: Any) -> Hypergradient:
    options = {"upper_batch": UPPER_BATCH, "lower_batches": BATCHES, **options}
    return sama_hypergradient(problem, upper, lower, update=update, **options)


def virtual_step(problem: Smooth, upper: Params, lower: Params, batches: list[Tensor]) -> Params:
    y = leaves(lower)
    g = gradients(problem.total(upper, y, batches), y)
    return {name: leaf.detach() - RATE * slope for (name, leaf), slope in zip(y.items(), g, strict=True)}


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("hvp", [*EXACT, FiniteDifference(), FiniteDifference(central=False), None], ids=str)
def test_darts_by_hand(hvp: HVPProvider | None, weight: float) -> None:
    problem, upper, lower = smooth(weight)
    at = virtual_step(problem, upper, lower, BATCHES)
    expected = by_hand(problem, upper, lower, at, RATE, BATCHES)
    result = darts(problem, upper, lower, hvp=hvp)
    tolerance = 1e-13 if hvp in EXACT else 1e-5 if hvp == FiniteDifference(central=False) else 1e-8
    assert relative_error(result, expected) <= tolerance
    assert float(result.loss) == pytest.approx(float(problem.upper_objective(upper, at, UPPER_BATCH)), rel=1e-13)
    y = leaves(lower)
    slope = torch.cat(gradients(problem.total(upper, y, BATCHES), y))
    assert result.stationarity == pytest.approx(float(slope.norm()), rel=1e-12)
    assert result.solution is not None
    assert (result.solution.status, result.solution.num_hvps) == (Status.BUDGET, 0)
    assert math.isnan(result.solution.residual_norms[1])


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("hvp", EXACT, ids=str)
def test_darts_with_an_exact_provider_is_one_unrolled_step(hvp: HVPProvider, weight: float) -> None:
    problem, upper, lower = smooth(weight)
    result = darts(problem, upper, lower, lower_batches=[BATCH], hvp=hvp)
    unrolled = unrolled_hypergradient(
        problem, upper, lower, upper_batch=UPPER_BATCH, lower_batches=[BATCH], update=SGDUpdate(RATE)
    )
    assert relative_error(result, list(unrolled.grad.values())) <= 1e-13


def test_darts_own_differences() -> None:
    """The formula of the paper: gradients in x at y +- e v with e = 0.01 / |v|."""
    problem, upper, lower = smooth(0.0)
    at = virtual_step(problem, upper, lower, [BATCH])
    x, z = leaves(upper), leaves(at)
    value = problem.upper_objective(x, z, UPPER_BATCH)
    direct, v = gradients(value, x, retain_graph=True), gradients(value, z)
    epsilon = 0.01 / float(torch.cat(v).norm())
    ends = []
    for sign in (1.0, -1.0):
        x = leaves(upper)
        y = {name: leaf + sign * epsilon * part for (name, leaf), part in zip(lower.items(), v, strict=True)}
        ends.append(gradients(problem.lower_objective(x, y, BATCH), x))
    expected = [d - RATE * (p - m) / (2 * epsilon) for d, p, m in zip(direct, *ends, strict=True)]
    result = darts(problem, upper, lower, lower_batches=[BATCH], hvp=FiniteDifference(step=0.01))
    assert relative_error(result, expected) <= 1e-12


def test_only_implicit_variables_make_the_virtual_step() -> None:
    problem, upper, lower = smooth()
    at = {"w": virtual_step(problem, upper, lower, BATCHES)["w"], "v": lower["v"]}
    multiplier = {"w": torch.tensor(RATE, dtype=torch.float64), "v": torch.tensor(0.0)}
    expected = by_hand(problem, upper, lower, at, multiplier, BATCHES)
    result = darts(problem, upper, lower, hvp=ReverseOverReverse(), implicit=["w"])
    assert relative_error(result, expected) <= 1e-13


def adam_diagonal(
    g: Tensor, mean: Tensor, square: Tensor, t: int, lr: float, betas: tuple[float, float], eps: float
) -> Tensor:
    """The derivative of Adam's displacement in g, by the quotient rule; the moments are those before the step."""
    b1, b2 = betas
    m, s = b1 * mean + (1 - b1) * g, b2 * square + (1 - b2) * g**2
    c1, c2 = 1 - b1**t, 1 - b2**t
    root = (s / c2).sqrt()
    return lr / c1 * ((1 - b1) / (root + eps) - m * (1 - b2) * g / (c2 * root * (root + eps) ** 2))


def lower_gradient(problem: Smooth, upper: Params, lower: Params) -> Params:
    y = leaves(lower)
    return dict(zip(y, gradients(problem.total(upper, y, BATCHES), y), strict=True))


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("hvp", [*EXACT, FiniteDifference(), None], ids=str)
@pytest.mark.parametrize("steps", [0, 4])
def test_sama_with_adam_by_hand(steps: int, hvp: HVPProvider | None, weight: float) -> None:
    problem, upper, lower = smooth(weight)
    update = AdamUpdate(0.1, (0.7, 0.9), 1e-3)
    state: State | None = None
    mean, square = ({name: torch.zeros_like(leaf) for name, leaf in lower.items()} for _ in range(2))
    for step in range(steps):
        for name in lower:
            past = vector(lower[name].numel(), 40 + step)
            mean[name], square[name] = 0.7 * mean[name] + 0.3 * past, 0.9 * square[name] + 0.1 * past**2
        state = {"step": {"count": torch.tensor(step + 1)}, "mean": mean, "square": square}
    g = lower_gradient(problem, upper, lower)
    diagonal = {
        name: adam_diagonal(g[name], mean[name], square[name], steps + 1, 0.1, (0.7, 0.9), 1e-3) for name in lower
    }
    expected = by_hand(problem, upper, lower, lower, diagonal, BATCHES)
    result = sama(problem, upper, lower, update, state=state, hvp=hvp)
    assert relative_error(result, expected) <= (1e-12 if hvp in EXACT else 1e-7)
    x, y = leaves(upper), leaves(lower)
    v = gradients(problem.upper_objective(x, y, UPPER_BATCH), y)
    assert result.solution is not None
    for name, part in zip(lower, v, strict=True):
        torch.testing.assert_close(result.solution.value[name], (weight or 1.0) * diagonal[name] * part)


def test_sama_with_plain_descent_is_the_learning_rate_times_the_gradient() -> None:
    problem, upper, lower = smooth()
    for update in (SGDUpdate(RATE), SGDUpdate(RATE, momentum=0.9), TorchUpdate(torch.optim.SGD, {"lr": RATE})):
        result = sama(problem, upper, lower, update, hvp=ReverseOverReverse())
        assert relative_error(result, by_hand(problem, upper, lower, lower, RATE, BATCHES)) <= 1e-13


def test_sama_takes_up_a_live_adam() -> None:
    problem, upper, start = smooth()
    lower = leaves(start)
    optimizer = torch.optim.Adam(list(lower.values()), lr=0.1, betas=(0.7, 0.9), eps=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        problem.total(upper, lower, BATCHES).backward()
        optimizer.step()
    update, state = from_optimizer(optimizer, lower)
    result = sama(problem, upper, lower, update, state=state, hvp=ReverseOverReverse())
    g = lower_gradient(problem, upper, lower)
    moments = {name: optimizer.state[leaf] for name, leaf in lower.items()}
    diagonal = {
        name: adam_diagonal(g[name], kept["exp_avg"], kept["exp_avg_sq"], 4, 0.1, (0.7, 0.9), 1e-3)
        for name, kept in moments.items()
    }
    assert relative_error(result, by_hand(problem, upper, lower, lower, diagonal, BATCHES)) <= 1e-12


def test_sama_holds_the_other_variables_fixed() -> None:
    problem, upper, lower = smooth()
    multiplier = {"w": torch.tensor(RATE, dtype=torch.float64), "v": torch.tensor(0.0)}
    result = sama(problem, upper, lower, SGDUpdate(RATE), hvp=ReverseOverReverse(), implicit=["w"])
    assert relative_error(result, by_hand(problem, upper, lower, lower, multiplier, BATCHES)) <= 1e-13


@pytest.mark.parametrize("hvp", [ReverseOverReverse(), None], ids=str)
def test_variables_that_nothing_uses_get_zeros(hvp: HVPProvider | None) -> None:
    problem, upper, lower = smooth()
    more, spare = {**upper, "idle": vector(2)}, {**lower, "spare": vector(3)}
    for result in (
        darts(problem, more, spare, hvp=hvp),
        sama(problem, more, spare, AdamUpdate(0.1), hvp=hvp),
    ):
        assert not result.grad["idle"].any()
        assert all(leaf.isfinite().all() for leaf in result.grad.values())
        assert result.solution is not None
        assert not result.solution.value["spare"].any()


def test_nothing_is_written() -> None:
    problem, upper, lower = smooth()
    x, y = leaves(upper), leaves(lower)
    held = {name: leaf.detach().clone() for name, leaf in y.items()}
    darts(problem, x, y)
    sama(problem, x, y, AdamUpdate(0.1))
    for name, leaf in y.items():
        assert leaf.grad is None
        assert leaf._version == 0
        assert torch.equal(leaf, held[name])


def test_what_is_not_finite_is_reported_and_kept() -> None:
    problem, upper, lower = smooth()
    broken = [BATCH * math.nan]
    calls = (
        lambda **options: darts(problem, upper, lower, lower_batches=broken, **options),
        lambda **options: darts(problem, upper, lower, upper_batch=BATCH * math.nan, **options),
        lambda **options: sama(problem, upper, lower, AdamUpdate(0.1), lower_batches=broken, **options),
    )
    for call in calls:
        with pytest.warns(SolverWarning, match="non-finite"):
            result = call()
        assert joined(result.grad).isnan().any()
        with pytest.raises(SolverError, match="non-finite"):
            call(on_failure="raise")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(on_failure="ignore")


@pytest.mark.parametrize("step_size", [0.0, -0.1, math.nan, math.inf, "0.1", True])
def test_a_bad_step_size(step_size: Any) -> None:
    with pytest.raises(ValueError, match="step_size must be a positive number"):
        darts(*smooth(), step_size=step_size)


def test_bad_arguments() -> None:
    problem, upper, lower = smooth()
    with pytest.raises(TypeError, match="update must be an Update"):
        sama(problem, upper, lower, torch.optim.Adam([torch.zeros(1)]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="state lacks"):
        sama(problem, upper, lower, AdamUpdate(0.1), state={})
    with pytest.raises(ValueError, match="lower_batches is empty"):
        darts(problem, upper, lower, lower_batches=[])
    with pytest.raises(ValueError, match="on_failure must be one of"):
        darts(problem, upper, lower, on_failure="shout")


def test_a_given_inverse_as_a_solver() -> None:
    problem, upper, lower = smooth(0.0)
    scaled = ApproximateInverse(lambda b: {name: RATE * leaf for name, leaf in b.items()})
    options: dict[str, Any] = {"upper_batch": UPPER_BATCH, "lower_batches": BATCHES}
    result = hypergradient(problem, upper, lower, solver=scaled, **options)
    assert relative_error(result, by_hand(problem, upper, lower, lower, RATE, BATCHES)) <= 1e-13
    assert result.solution is not None
    assert result.solution.relative_change == pytest.approx(1.0 - RATE, rel=1e-12)
    assert result.solution.cosine == pytest.approx(1.0, rel=1e-12)
    with pytest.raises(TypeError, match="inverse must be a function"):
        ApproximateInverse(0.1)  # type: ignore[arg-type]
