"""The lower optimizer's sensitivity in place of the inverse, against hand-written formulas."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import Hypergradient, Params, Problem, SGDUpdate, SolverError, SolverWarning, hypergradient
from bilevel.hypergradients import SAMA, AdamUpdate, TorchUpdate, Update, from_optimizer
from bilevel.hypergradients.updates.update import State
from bilevel.linear import ApproximateInverse
from bilevel.products import FiniteDifference, HVPProvider, ReverseOverReverse
from tests.support.by_hand import (
    BATCH,
    BATCHES,
    EXACT,
    RATE,
    UPPER_BATCH,
    Smooth,
    by_hand,
    gradients,
    leaves,
    relative_error,
    run,
    smooth,
)
from tests.support.cases import joined, vector


def sama(problem: Problem, upper: Params, lower: Params, update: Update, **options: Any) -> Hypergradient:
    """`options` are the method's."""
    return run(problem, upper, lower, SAMA(update, **options))


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
@pytest.mark.parametrize("hvp", [*EXACT, FiniteDifference()], ids=str)
@pytest.mark.parametrize("steps", [0, 4])
def test_sama_with_adam_by_hand(steps: int, hvp: HVPProvider, weight: float) -> None:
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


@pytest.mark.parametrize("options", [{}, {"hvp": ReverseOverReverse()}], ids=["default", "exact"])
def test_variables_that_nothing_uses_get_zeros(options: dict[str, Any]) -> None:
    problem, upper, lower = smooth()
    more, spare = {**upper, "idle": vector(2)}, {**lower, "spare": vector(3)}
    result = sama(problem, more, spare, AdamUpdate(0.1), **options)
    assert not result.grad["idle"].any()
    assert all(leaf.isfinite().all() for leaf in result.grad.values())
    assert result.solution is not None
    assert not result.solution.value["spare"].any()


def test_nothing_is_written() -> None:
    problem, upper, lower = smooth()
    x, y = leaves(upper), leaves(lower)
    held = {name: leaf.detach().clone() for name, leaf in y.items()}
    sama(problem, x, y, AdamUpdate(0.1))
    for name, leaf in y.items():
        assert leaf.grad is None
        assert leaf._version == 0
        assert torch.equal(leaf, held[name])


def test_what_is_not_finite_is_reported_and_kept() -> None:
    case, broken = (*smooth(), SAMA(AdamUpdate(0.1))), [BATCH * math.nan]
    with pytest.warns(SolverWarning, match="non-finite"):
        result = run(*case, lower_batches=broken)
    assert joined(result.grad).isnan().any()
    with pytest.raises(SolverError, match="non-finite"):
        run(*case, lower_batches=broken, on_failure="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(*case, lower_batches=broken, on_failure="ignore")


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="SAMA: update must be an Update such as AdamUpdate"):
        SAMA(torch.optim.Adam([torch.zeros(1)]))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"SAMA: update must be .* got the class AdamUpdate"):
        SAMA(AdamUpdate)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="SAMA: a state belongs to an update"):
        SAMA(state={})
    with pytest.raises(ValueError, match="SAMA: lower_batches must be a whole number of at least 1, got 0"):
        SAMA(AdamUpdate(0.1), lower_batches=0)
    with pytest.raises(TypeError, match="hvp must be"):
        SAMA(AdamUpdate(0.1), hvp="exact")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="state lacks"):
        run(*smooth(), SAMA(AdamUpdate(0.1), state={}))
    with pytest.raises(ValueError, match="SAMA: update is missing; there is no lower optimizer here"):
        run(*smooth(), SAMA())
    assert SAMA(lower_batches=3).stored_batches == 3


def test_a_given_inverse_as_a_solver() -> None:
    problem, upper, lower = smooth(0.0)
    scaled = ApproximateInverse(lambda b: {name: RATE * leaf for name, leaf in b.items()})
    result = hypergradient(problem, upper, lower, scaled, upper_batch=UPPER_BATCH, lower_batches=BATCHES)
    assert relative_error(result, by_hand(problem, upper, lower, lower, RATE, BATCHES)) <= 1e-13
    assert result.solution is not None
    assert result.solution.relative_change == pytest.approx(1.0 - RATE, rel=1e-12)
    assert result.solution.cosine == pytest.approx(1.0, rel=1e-12)
    with pytest.raises(TypeError, match="inverse must be a function"):
        ApproximateInverse(0.1)  # type: ignore[arg-type]
