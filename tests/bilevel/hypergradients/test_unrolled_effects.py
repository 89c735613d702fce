"""What unrolling leaves alone, keeps in memory, repeats and reports."""

import gc
import math
import warnings
import weakref
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from bilevel import Hypergradient, Params, Problem, SolverError, SolverWarning, functional_call
from bilevel.hypergradients.updates.update import AdamUpdate, SGDUpdate
from tests.support.cases import joined, vector
from tests.support.problems.unrolled_cases import (
    BATCHES,
    BOTH,
    PROCEDURES,
    UPPER_BATCH,
    Quadratic,
    Smooth,
    quadratic,
    relative_error,
    smooth,
    unroll,
)


class Normalized(Problem):
    """A network with batch statistics and random masks in both levels."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 1)
        ).double()

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        outputs = functional_call(self.net, lower, (batch,))
        return (outputs.squeeze(1) - upper["targets"]).square().mean()

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return functional_call(self.net, lower, (batch,)).square().mean()

    def variables(self) -> tuple[Params, Params]:
        lower = {name: leaf.detach().clone() for name, leaf in self.net.named_parameters()}
        return {"targets": vector(4, 30)}, lower


@BOTH
def test_buffers_are_not_written_and_masks_repeat(recompute: bool) -> None:
    problem = Normalized()
    upper, lower = problem.variables()
    before = {name: leaf.clone() for name, leaf in problem.net.state_dict().items()}
    update = SGDUpdate(0.2, momentum=0.5)

    def seeded(seed: int, x: Params, *, again: bool) -> Hypergradient:
        torch.manual_seed(seed)
        return unroll(problem, x, lower, update, recompute=again)

    stored = seeded(3, upper, again=False)
    state = torch.get_rng_state()
    result = seeded(3, upper, again=recompute)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(leaf, before[name]) for name, leaf in problem.net.state_dict().items())
    assert relative_error(result.grad["targets"], stored.grad["targets"]) <= 1e-12
    assert result.lower is not None
    assert stored.lower is not None
    assert relative_error(joined(result.lower), joined(stored.lower)) <= 1e-12
    other = seeded(4, upper, again=recompute)
    assert relative_error(other.grad["targets"], stored.grad["targets"]) > 1e-3
    # The derivative is that of the path with these masks, which every run from the same seed draws.
    h, e = 1e-5, vector(4, 31)
    ahead, behind = (
        float(seeded(3, {"targets": upper["targets"] + step * e}, again=recompute).loss) for step in (h, -h)
    )
    assert float(result.grad["targets"] @ e) == pytest.approx((ahead - behind) / (2 * h), rel=1e-6)


@BOTH
def test_every_step_draws_its_own_mask_and_the_way_back_draws_it_again(recompute: bool) -> None:
    drawn: list[float] = []

    class Drawing(Quadratic):
        check_curvature = False

        def lower_objective(self, upper: Params, lower: Params, batch: float) -> Tensor:
            drawn.append(float(torch.rand(())))
            return super().lower_objective(upper, lower, batch)

    _, upper, lower = quadratic()
    unroll(Drawing(), upper, lower, SGDUpdate(0.1), upper_batch=None, lower_batches=[1.0] * 4, recompute=recompute)
    forwards, last = drawn[:4], drawn[-1]
    assert len({*forwards, last}) == 5
    assert drawn[4:-1] == (forwards[::-1] if recompute else [])


class Token:
    """Lives as long as the piece of graph that holds it."""

    alive: ClassVar[weakref.WeakSet["Token"]] = weakref.WeakSet()
    peak: ClassVar[int] = 0

    def __init__(self) -> None:
        Token.alive.add(self)
        Token.peak = max(Token.peak, len(Token.alive))


class Square(torch.autograd.Function):
    """y^2 with a gradient that is a `Slope`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return y * y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return Slope.apply(ctx.saved_tensors[0], grads[0])


class Slope(torch.autograd.Function):
    """2 y g; its node, and with it the token, is part of the graph of the gradient, if that has one."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(y, g)
        ctx.token = Token()
        return 2.0 * y * g

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        y, g = ctx.saved_tensors
        return 2.0 * g * grads[0], 2.0 * y * grads[0]


def test_memory_of_one_step_where_it_is_recomputed() -> None:
    class Counted(Problem):
        def lower_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
            return Square.apply(lower["y"] - upper["x"]).sum()  # type: ignore[union-attr]

        def upper_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
            return lower["y"].sum()

    def peak(count: int, **options: Any) -> int:
        assert not Token.alive
        Token.peak = 0
        x, y = {"x": vector(3, 1)}, {"y": vector(3, 2)}
        unroll(Counted(), x, y, SGDUpdate(0.1), upper_batch=None, lower_batches=[None] * count, **options)
        assert not Token.alive
        return Token.peak

    gc.collect()
    gc.disable()
    try:
        assert [peak(count) for count in (1, 5, 20)] == [1, 5, 20]
        assert [peak(count, recompute=True) for count in (1, 5, 20)] == [1, 1, 1]
        assert peak(20, steps=3) == 3
        assert peak(20, steps=3, recompute=True) == 1
    finally:
        gc.enable()


@BOTH
def test_nothing_is_written_and_grad_mode_does_not_matter(recompute: bool) -> None:
    problem, upper, lower = smooth()
    for x in (upper, lower):
        x.update({name: nn.Parameter(leaf) for name, leaf in x.items()})
    held = {name: leaf.detach().clone() for name, leaf in (upper | lower).items()}
    reference = unroll(problem, upper, lower, PROCEDURES["adam"][0], recompute=recompute)
    with torch.no_grad():
        quiet = unroll(problem, upper, lower, PROCEDURES["adam"][0], recompute=recompute)
    assert all(torch.equal(quiet.grad[name], reference.grad[name]) for name in upper)
    for name, leaf in (upper | lower).items():
        assert leaf.grad is None
        assert leaf._version == 0
        assert torch.equal(leaf, held[name])


@BOTH
@pytest.mark.parametrize("position", [0, 2, 5])
def test_a_nan_in_the_lower_data_is_reported_and_kept(position: int, recompute: bool) -> None:
    _, upper, lower = smooth()
    batches: list[Any] = [*BATCHES]
    batches[position] = BATCHES[position] * math.nan
    options: dict[str, Any] = {"lower_batches": batches, "recompute": recompute}
    with pytest.warns(SolverWarning, match="the lower steps left the finite numbers"):
        result = unroll(Smooth(), upper, lower, SGDUpdate(0.1), **options)
    assert joined(result.grad).isnan().any()
    with pytest.raises(SolverError, match="lower the learning rate") as caught:
        unroll(Smooth(), upper, lower, AdamUpdate(0.1), on_failure="raise", **options)
    assert caught.value.solution is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unroll(Smooth(), upper, lower, SGDUpdate(0.1), on_failure="ignore", **options)


def test_what_is_not_finite_is_told_apart() -> None:
    _, upper, lower = smooth()
    with pytest.warns(SolverWarning, match="dF/dy is not finite"):
        unroll(Smooth(), upper, lower, SGDUpdate(0.1), upper_batch=UPPER_BATCH * math.nan)

    class Rooted(Problem):
        def lower_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
            return (upper["x"] * lower["y"]).sum() + (lower["y"].pow(1.5).sum() if batch else 0.0)

        def upper_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
            return lower["y"].sum()

    # The first step leads to 0, where the gradient of y^1.5 is finite and its derivative is not.
    x, y = {"x": torch.ones(2).double()}, {"y": torch.full((2,), 0.25).double()}
    with pytest.warns(SolverWarning, match="the derivative through the lower steps is not finite"):
        unroll(Rooted(), x, y, SGDUpdate(0.25), lower_batches=[False, True])


def name_of(value: Any) -> str:
    if isinstance(value, type):
        return value.__name__
    return "+".join(value) if isinstance(value, dict) else value


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lower_batches": []}, ValueError, "lower_batches is empty"),
        ({"lower_batches": BATCHES[0]}, TypeError, "lower_batches must be a sequence"),
        ({"steps": 0}, ValueError, "Unrolled: steps must be a whole number of at least 1"),
        ({"steps": True}, ValueError, "Unrolled: steps"),
        ({"implicit": "w"}, TypeError, "Unrolled: implicit must be names of lower variables"),
        ({"implicit": ["nothing"]}, ValueError, "nothing"),
        ({"on_failure": "shout"}, ValueError, "on_failure must be one of"),
        (
            {"update": torch.optim.SGD([torch.zeros(1)], lr=0.1)},
            TypeError,
            "Unrolled: update must be an Update or a function",
        ),
        ({"update": lambda x: 0.1}, TypeError, "update must make an Update"),
    ],
    ids=lambda value: (
        value.__name__ if isinstance(value, type) else "+".join(value) if isinstance(value, dict) else value
    ),
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    problem, upper, lower = smooth()
    with pytest.raises(error, match=message):
        unroll(problem, upper, lower, **{"update": SGDUpdate(0.1), **options})
