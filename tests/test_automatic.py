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
