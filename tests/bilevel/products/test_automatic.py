"""The automatic provider: what it measures, keeps and falls back to."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import Implicit, Params, Problem, SolverWarning, linearize
from bilevel.products import FiniteDifference, ForwardOverReverse, HVPProvider, ReverseOverReverse
from bilevel.products import automatic as automatic_module
from bilevel.products.automatic import Automatic, as_provider
from tests.support.problems.closed_forms import proximal_point, run
from tests.support.problems.two_heads import implicit, make


def test_auto_gives_the_exact_hypergradient_and_reports() -> None:
    problem, upper, lower = proximal_point()
    automatic = Automatic()
    found = run(problem, upper, lower, Implicit(hvp=automatic, damping=1.0))
    exact = run(problem, upper, lower, Implicit(damping=1.0))
    assert all(torch.allclose(found.grad[n], exact.grad[n], rtol=1e-12) for n in upper)
    assert [type(entry.provider) for entry in automatic.report] == [ReverseOverReverse, ForwardOverReverse]
    assert all(entry.seconds is not None and entry.seconds > 0.0 for entry in automatic.report)
    assert all(entry.difference is not None and entry.difference < 1e-12 for entry in automatic.report)
    assert str(automatic).count("(chosen)") == 1
    assert automatic.exact


def test_the_word_auto_makes_one_and_it_measures_once() -> None:
    problem, upper, lower = proximal_point()
    system = linearize(problem, upper, lower, [None], hvp="auto")
    assert isinstance(system.hvp, Automatic)
    report = system.hvp.report
    assert len(report) == 2
    linearize(problem, upper, lower, [None], hvp=system.hvp)
    assert system.hvp.report is report
    run(problem, upper, lower, Implicit(hvp=system.hvp))
    assert system.hvp.report is report


class _OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return 2.0 * x * grads[0]


class _FirstOrderOnly(Problem):
    def lower_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
        return _OnceDifferentiable.apply(lower["y"]).sum()

    def upper_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
        return lower["y"].sum()


def test_finite_differences_only_where_nothing_exact_works() -> None:
    y = torch.ones(3, dtype=torch.float64)
    automatic = Automatic()
    system = linearize(_FirstOrderOnly(), {"x": y.clone()}, {"y": y}, [None], hvp=automatic)
    assert isinstance(automatic.chosen, FiniteDifference)
    assert all(entry.failure for entry in automatic.report)
    assert not system.operator.exact
    assert torch.allclose(system.operator({"y": y})["y"], 2.0 * y, rtol=1e-8)


def test_other_words_are_refused() -> None:
    with pytest.raises(TypeError, match="'auto'"):
        as_provider("fastest")  # type: ignore[arg-type]


class _Deep(Problem):
    """A first backward pass that costs much more than the second: kept graphs win by far."""

    regularization_weight = 1.0
    passes = 0

    def lower_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
        self.passes += 1
        # Work that no derivative repeats, so that a recomputed product is slow on any machine.
        for _ in range(300):
            torch.linalg.matrix_norm(torch.ones(64, 64, dtype=torch.float64))
        return lower["y"].exp().sum()

    def upper_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
        return lower["y"].sum()

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return 0.5 * (lower["y"] - upper["y"]).square().sum()


Y = torch.linspace(-1.0, 1.0, 1000, dtype=torch.float64)


def test_kept_graphs_are_tried_under_a_budget_and_win_where_recomputing_is_dear() -> None:
    problem, automatic = _Deep(), Automatic(memory_budget=1e6)
    system = linearize(problem, {"y": Y.clone()}, {"y": Y}, [None] * 3, hvp=automatic)
    kept = ReverseOverReverse(keep_graph=True, memory_budget=1e6)
    assert [entry.provider for entry in automatic.report] == [ReverseOverReverse(), ForwardOverReverse(), kept]
    assert automatic.chosen == kept
    before = problem.passes
    for _ in range(4):
        torch.testing.assert_close(system.operator({"y": Y})["y"], (Y.exp() + 1.0) * Y)
    assert problem.passes == before + 3
    times = [entry.seconds for entry in automatic.report]
    # One of five products is at the full price.
    assert times[0] is not None
    assert times[2] is not None
    assert 0.2 * times[0] <= times[2] < times[0]
    assert automatic.report[2].difference == 0.0


def test_a_budget_too_small_for_one_graph_is_reported() -> None:
    automatic = Automatic(memory_budget=100)
    linearize(_Deep(), {"y": Y.clone()}, {"y": Y}, [None], hvp=automatic)
    assert "memory_budget=100 bytes" in automatic.report[2].failure
    assert "memory_budget=100 bytes" in str(automatic)
    assert automatic.chosen in (ReverseOverReverse(), ForwardOverReverse())


def test_a_bad_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="Automatic: memory_budget"):
        Automatic(memory_budget=-1)


class _HalfDetached(torch.autograd.Function):
    """x^3 whose backward takes the derivative of part of itself for a constant, and which has no forward mode."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, share: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.share = share  # type: ignore[attr-defined]
        return x.pow(3)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        share: float = ctx.share  # type: ignore[attr-defined]
        return 3.0 * (share * x.detach().square() + (1.0 - share) * x.square()) * grads[0], None


class _Cubic(Problem):
    """d2L/dydy = 6 (1 - share) y + 0.6 y^2 by double backward, 6 y + 0.6 y^2 in truth."""

    def __init__(self, share: float) -> None:
        self.share = share

    def lower_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
        return (_HalfDetached.apply(lower["y"], self.share) + 0.05 * lower["y"].pow(4)).sum()

    def upper_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
        return lower["y"].sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_second_derivative_that_is_cut_off_in_part_is_warned_of(share: float, dtype: torch.dtype) -> None:
    y, automatic = torch.full((4,), 1.0, dtype=dtype), Automatic()
    distance = 6.0 * share / 6.6
    with pytest.warns(SolverWarning, match=f"d2G/dydy by {distance:.1e}.*_HalfDetached"):
        linearize(_Cubic(share), {"x": y.clone()}, {"y": y}, [None], hvp=automatic)
    assert automatic.chosen == ReverseOverReverse()
    assert automatic.report[1].failure


def test_an_only_candidate_that_is_right_is_not_warned_of() -> None:
    y, automatic = torch.linspace(0.5, 1.0, 4, dtype=torch.float64), Automatic()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linearize(_Cubic(0.0), {"x": y.clone()}, {"y": y}, [None], hvp=automatic)
    assert automatic.report[0].difference == 0.0
    assert automatic.chosen == ReverseOverReverse()


class _NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        return grads[0]


@pytest.mark.parametrize("width", [2, 128])
def test_kinks_make_no_alarm(width: int) -> None:
    # In float32 the differences cross kinks: they are far off, at one step otherwise than at another.
    generator = torch.Generator().manual_seed(width)
    X, labels = torch.randn(500, 10, generator=generator), torch.randint(3, (500,), generator=generator)

    class Kinked(_FirstOrderOnly):
        def lower_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
            hidden = (X @ _NoForwardMode.apply(lower["a"])).relu()
            return torch.nn.functional.cross_entropy((hidden @ lower["b"]).relu() @ lower["c"], labels)

    shapes = {"a": (10, width), "b": (width, width), "c": (width, 3)}
    lower = {n: torch.randn(s, generator=generator) / s[0] ** 0.5 for n, s in shapes.items()}
    automatic = Automatic()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linearize(Kinked(), {"x": torch.ones(1)}, lower, [None], hvp=automatic)
    assert automatic.chosen == ReverseOverReverse()


def with_choice(state: dict[str, Any], chosen: HVPProvider) -> dict[str, Any]:
    return {**state, "method": {"name": "Implicit", "state": {"hvp": str(chosen)}}}


@pytest.mark.parametrize("chosen", [ReverseOverReverse(), ForwardOverReverse()])
def test_a_resumed_trainer_keeps_the_choice_and_measures_nothing(
    chosen: HVPProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(method=implicit(hvp="auto"))
    assert first.state_dict()["method"]["state"] == {}

    def never(*what: Any) -> None:
        pytest.fail("measured again")

    with monkeypatch.context() as patch:
        patch.setattr("bilevel.products.automatic._measure", never)
        first.load_state_dict(with_choice(first.state_dict(), chosen))
        first.advance()
        assert first.state_dict()["method"]["state"] == {"hvp": str(chosen)}
        fixed = make(method=implicit(hvp=ReverseOverReverse()))
        fixed.load_state_dict(first.state_dict())
        fixed.advance()
        assert fixed.state_dict()["method"]["state"] == {}
    unchosen = make(method=implicit(hvp="auto"))
    unchosen.advance()
    assert unchosen.state_dict()["method"]["state"]["hvp"] in map(str, (ReverseOverReverse(), ForwardOverReverse()))


def test_two_trainings_by_one_method_choose_each_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    method, seen = implicit(hvp="auto"), list[int]()
    real = automatic_module._measure
    monkeypatch.setattr("bilevel.products.automatic._measure", lambda first: (seen.append(1), real(first))[1])
    for _ in range(2):
        make(method=method).advance()
    assert len(seen) == 2


def test_a_choice_that_is_no_candidate_is_refused() -> None:
    kept = ReverseOverReverse(keep_graph=True, memory_budget=1e6)
    same = Automatic(memory_budget=1e6)
    same.load_state_dict({"chosen": str(kept)})
    assert same.chosen == kept
    with pytest.raises(ValueError, match="resume with the same memory_budget, here None"):
        Automatic().load_state_dict({"chosen": str(kept)})
