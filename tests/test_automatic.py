"""The automatic provider: what it measures, keeps and falls back to."""

import pytest
import torch
from closed_forms import proximal_point, run
from torch import Tensor

from bilevel import FiniteDifference, ForwardOverReverse, Params, Problem, ReverseOverReverse, linearize
from bilevel.automatic import Automatic, as_provider


def test_auto_gives_the_exact_hypergradient_and_reports() -> None:
    problem, upper, lower = proximal_point()
    automatic = Automatic()
    found = run(problem, upper, lower, hvp=automatic, damping=1.0)
    exact = run(problem, upper, lower, damping=1.0)
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
    run_again = run(problem, upper, lower, system=system, hvp="auto")
    assert run_again.solution is not None


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
