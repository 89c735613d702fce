"""When a system may be used again, and when it says that it must not."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import CG, Params, Problem, functional_call, linearize
from bilevel.hypergradients import System
from bilevel.lower import StaleSystemError
from bilevel.products import ReverseOverReverse
from tests.support.problems.smooth import BATCHES, Separable, Smooth, variables


def fresh_system(problem: Problem | None = None) -> tuple[System, Params, Params, list[dict[str, Tensor]]]:
    class Nested(Smooth):
        def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
            return super().lower_objective(upper, lower, batch["x"])

    upper, lower = variables()
    batches = [{"x": batch.clone()} for batch in BATCHES]
    return linearize(problem or Nested(0.5), upper, lower, batches), upper, lower, batches


def use(system: System) -> None:
    system.hypergradient(BATCHES[0], on_failure="ignore")


def by_optimizer(x: Params, name: str) -> None:
    parameter = x[name].requires_grad_()
    parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([parameter], lr=0.1).step()


def by_data(x: Params, name: str) -> None:
    version = x[name]._version
    x[name].data.add_(1.0)
    assert x[name]._version == version, "the case is of no use if the version counter sees it"


def by_object(x: Params, name: str) -> None:
    x[name] = x[name].clone()


@pytest.mark.parametrize(
    ("argument", "name", "change"),
    [
        ("lower", "v", by_optimizer),
        ("lower", "v", by_data),
        ("upper", "shift", by_optimizer),
        ("upper", "shift", by_data),
        ("lower_batches[1]", "x", by_optimizer),
        ("lower_batches[1]", "x", by_data),
        ("lower_batches[1]", "x", by_object),
    ],
)
def test_a_changed_system_is_stale(argument: str, name: str, change: Callable[[Params, str], None]) -> None:
    system, upper, lower, batches = fresh_system()
    use(system)
    use(system)
    change({"lower": lower, "upper": upper, "lower_batches[1]": batches[1]}[argument], name)
    for used in (use, lambda system: system.solve(system.variables(lower)), System.check_fresh):
        with pytest.raises(StaleSystemError, match=argument.replace("[", r"\[").replace("]", r"\]")) as caught:
            used(system)
        assert "call linearize again" in str(caught.value)


def test_a_system_holds_its_variables_whatever_becomes_of_the_dictionaries() -> None:
    system, upper, lower, _ = fresh_system()
    before = system.hypergradient(BATCHES[0], on_failure="ignore")
    by_object(lower, "v")
    lower["v"].zero_()
    upper.clear()
    after = system.hypergradient(BATCHES[0], on_failure="ignore")
    assert all(torch.equal(after.grad[name], before.grad[name]) for name in before.grad)


def test_a_batch_with_one_tensor_more_is_stale() -> None:
    system, _, _, batches = fresh_system()
    batches[2]["more"] = torch.ones(1)
    with pytest.raises(StaleSystemError, match="lower_batches"):
        use(system)


def test_upper_variables_may_move_where_the_curvature_does_not_depend_on_them() -> None:
    upper, lower = variables()
    system = linearize(Separable(), upper, lower, BATCHES)
    before = system.hypergradient(BATCHES[0]).grad["w"]
    for change in (by_optimizer, by_data):
        change(upper, "w")
        now = system.hypergradient(BATCHES[0]).grad["w"]
        fresh = linearize(Separable(), upper, lower, BATCHES).hypergradient(BATCHES[0]).grad["w"]
        assert not torch.equal(now, before)
        torch.testing.assert_close(now, fresh, rtol=1e-9, atol=1e-12)


def test_another_regularization_weight_is_stale() -> None:
    system, _, lower, _ = fresh_system()
    system.problem.regularization_weight = 0.25
    for used in (lambda: use(system), lambda: system.solve(system.variables(lower))):
        with pytest.raises(StaleSystemError, match=r"regularization_weight changed after linearize \(0\.5 -> 0\.25\)"):
            used()
    system.problem.regularization_weight = 0.5
    use(system)


def test_invalidate_by_hand() -> None:
    system, _, lower, _ = fresh_system()
    system.invalidate()
    with pytest.raises(StaleSystemError, match="invalidated"):
        use(system)
    with pytest.raises(StaleSystemError, match="invalidated"):
        system.solve(lower)


class _Frozen(Problem):
    """A regression through a batch normalisation in eval mode, whose statistics are read."""

    def __init__(self) -> None:
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)).double()
        self.net.eval()

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return functional_call(self.net, lower, (batch,)).square().mean()

    upper_objective = lower_objective


def _frozen(**options: Any) -> tuple[_Frozen, System]:
    torch.manual_seed(0)
    problem = _Frozen()
    lower = {name: p.detach() for name, p in problem.net.named_parameters()}
    batches = [torch.randn(5, 3, dtype=torch.float64) for _ in range(2)]
    return problem, linearize(problem, {}, lower, batches, tikhonov=1.0, **options)


@pytest.mark.parametrize("keep_graph", [False, True], ids=["recomputed", "kept"])
def test_a_changed_buffer_that_was_read_is_noticed(keep_graph: bool) -> None:
    problem, system = _frozen(hvp=ReverseOverReverse(keep_graph=keep_graph))
    b = {name: torch.ones_like(leaf) for name, leaf in system.lower.items()}
    system.solve(b)
    system.solve(b)
    problem.net[1].running_var.mul_(0.01)  # type: ignore[union-attr]
    with pytest.raises(StaleSystemError, match="running_var' changed after linearize"):
        system.solve(b)


def test_buffers_that_are_not_read_may_change() -> None:
    problem, system = _frozen()
    problem.net.train()
    b = {name: torch.ones_like(leaf) for name, leaf in system.lower.items()}
    system.solve(b)
    problem.net[1].running_var.mul_(0.01)  # type: ignore[union-attr]
    system.solve(b)


def test_a_dropped_system_is_gone_at_once() -> None:
    _, system = _frozen(hvp=ReverseOverReverse(keep_graph=True), solver=CG(5, recycle=5))
    system.solve({name: torch.ones_like(leaf) for name, leaf in system.lower.items()})
    gone = weakref.ref(system)
    gc.disable()
    try:
        del system
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("keep_graph", [False, True])
def test_the_cross_term_is_at_the_upper_variables_as_they_are_now(keep_graph: bool) -> None:
    class Weighted(Problem):
        def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
            # The exponential's derivative is taken from its value, which no counter watches.
            return 0.5 * (upper["x"].exp() * lower["y"].square()).sum()

    x, y = {"x": torch.zeros(2, dtype=torch.float64)}, {"y": torch.ones(2, dtype=torch.float64)}
    system = linearize(Weighted(), x, y, [None], hvp=ReverseOverReverse(keep_graph=keep_graph))
    system.operator(y)
    assert torch.equal(system.cross(y)["x"], torch.ones(2, dtype=torch.float64))
    x["x"].add_(1.0)
    torch.testing.assert_close(system.cross(y)["x"], torch.ones(2, dtype=torch.float64).exp())
