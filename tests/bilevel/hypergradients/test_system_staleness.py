"""When a system may be used again, and when it says that it must not."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import CG, Params, Problem, functional_call, hypergradient, linearize
from bilevel.hypergradients import System
from bilevel.lower import StaleSystemError
from bilevel.products import ForwardOverReverse, ReverseOverReverse
from tests.support.smooth import BATCHES, Separable, Smooth, variables


def fresh_system(problem: Problem | None = None) -> tuple[System, Params, Params, list[dict[str, Tensor]]]:
    class Nested(Smooth):
        def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
            return super().lower_objective(upper, lower, batch["x"])

    upper, lower = variables()
    batches = [{"x": batch.clone()} for batch in BATCHES]
    return linearize(problem or Nested(0.5), upper, lower, batches), upper, lower, batches


def use(system: System, upper: Params, lower: Params) -> None:
    hypergradient(system.problem, upper, lower, upper_batch=BATCHES[0], system=system, on_failure="ignore")


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


@pytest.mark.parametrize("change", [by_optimizer, by_data, by_object])
@pytest.mark.parametrize(("argument", "name"), [("lower", "v"), ("upper", "tikhonov"), ("lower_batches[1]", "x")])
def test_a_changed_system_is_stale(argument: str, name: str, change: Callable[[Params, str], None]) -> None:
    system, upper, lower, batches = fresh_system()
    use(system, upper, lower)
    use(system, upper, lower)
    change({"lower": lower, "upper": upper, "lower_batches[1]": batches[1]}[argument], name)
    with pytest.raises(StaleSystemError, match=argument.replace("[", r"\[").replace("]", r"\]")) as caught:
        use(system, upper, lower)
    assert "call linearize again" in str(caught.value)


def test_a_batch_with_one_tensor_more_is_stale() -> None:
    system, upper, lower, batches = fresh_system()
    batches[2]["more"] = torch.ones(1)
    with pytest.raises(StaleSystemError, match="lower_batches"):
        use(system, upper, lower)


def test_upper_variables_may_move_where_the_curvature_does_not_depend_on_them() -> None:
    upper, lower = variables()
    system = linearize(Separable(), upper, lower, BATCHES)
    for change in (by_optimizer, by_data, by_object):
        change(upper, "w")
        use(system, upper, lower)
    upper["w"] = torch.ones(4)
    with pytest.raises(StaleSystemError, match="upper"):
        use(system, upper, lower)


def test_other_lower_variables_are_stale_whatever_their_values() -> None:
    system, upper, lower, _ = fresh_system()
    with pytest.raises(StaleSystemError, match="lower: not the tensors"):
        use(system, upper, {name: leaf.clone() for name, leaf in lower.items()})
    with pytest.raises(StaleSystemError, match="lower: not the tensors"):
        use(system, upper, {**lower, "more": torch.ones(1)})


def test_another_regularization_weight_is_stale() -> None:
    system, upper, lower, _ = fresh_system()
    system.problem.regularization_weight = 0.25
    for used in (lambda: use(system, upper, lower), lambda: system.solve(system.variables(lower))):
        with pytest.raises(StaleSystemError, match=r"regularization_weight changed after linearize \(0\.5 -> 0\.25\)"):
            used()
    system.problem.regularization_weight = 0.5
    use(system, upper, lower)


def test_invalidate_by_hand() -> None:
    system, upper, lower, _ = fresh_system()
    system.invalidate()
    with pytest.raises(StaleSystemError, match="invalidated"):
        use(system, upper, lower)
    with pytest.raises(StaleSystemError, match="invalidated"):
        system.solve(lower)


def test_staleness_copes_with_any_tensor_in_a_batch() -> None:
    class Anything(Smooth):
        def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
            return super().lower_objective(upper, lower, BATCHES[0])

    with torch.inference_mode():
        inference = torch.ones(2)
    strange = [
        *(torch.eye(3).to_sparse(), torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.bfloat16)),
        *(torch.tensor([True, False]), torch.tensor(3), torch.ones(0, 2), inference),
        torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.ones(1, 3).expand(2, 3),
        torch.full((2,), torch.nan),
    ]
    upper, lower = variables()
    system = linearize(Anything(0.5), upper, lower, [strange])
    use(system, upper, lower)
    strange[7].data[1, 2, 3, 4] = 5.0
    with pytest.raises(StaleSystemError, match=r"lower_batches\[0\], tensor 7"):
        use(system, upper, lower)


def test_parameters_given_again_with_a_system_must_be_the_same() -> None:
    problem, (upper, lower) = Smooth(0.5), variables()
    shaped: dict[str, Any] = {
        "solver": CG(50, rtol=1e-6),
        "hvp": ForwardOverReverse(),
        "damping": 2.0,
        "tikhonov": {"v": 1.0},
        "implicit": ["w", "v"],
    }
    system = linearize(problem, upper, lower, BATCHES, **shaped)

    def again(**options: Any) -> None:
        hypergradient(problem, upper, lower, upper_batch=BATCHES[0], system=system, **options)

    again(**shaped, lower_batches=BATCHES)
    again(implicit=lambda name: True, solver=CG(50, rtol=1e-6))
    others: dict[str, Any] = {
        "solver": CG(51, rtol=1e-6),
        "hvp": ReverseOverReverse(),
        "damping": 0.0,
        "tikhonov": 1.0,
        "implicit": ["w"],
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match=f"^{name}="):
            again(**{name: other})
    for batches in (BATCHES[:2], [batch.clone() for batch in BATCHES]):
        with pytest.raises(ValueError, match="lower_batches"):
            again(lower_batches=batches)
    with pytest.raises(ValueError, match="problem"):
        hypergradient(Smooth(0.5), upper, lower, upper_batch=BATCHES[0], system=system)


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
