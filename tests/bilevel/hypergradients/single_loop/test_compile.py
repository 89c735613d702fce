"""Steps through torch.compile are those without, and objectives that it cannot take are refused in words."""

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import AlternatingSchedule, Level, Params, Problem, Trainer, functional_call
from bilevel.hypergradients import F2SA, MRBO, SABA, SOBA, SingleLoop
from tests.support.cases import joined, vector
from tests.support.methods import METHODS
from tests.support.problems.sampled_quadratic import PROBLEM, blocks, variables

SAMPLED = {name: kind.method for name, kind in METHODS.items() if isinstance(kind.method, SingleLoop)}


def trained(method: SingleLoop, problem: Problem = PROBLEM) -> Tensor:
    torch.manual_seed(0)
    upper, lower = variables()
    trainer = Trainer(
        problem,
        Level(upper, torch.optim.SGD(upper.values(), lr=0.05), blocks("upper")),
        Level(lower, torch.optim.SGD(lower.values(), lr=0.1), blocks("lower")),
        AlternatingSchedule(1, 0 if method.moves_lower else 1, 6),
        method,
    )
    trainer.run()
    return torch.cat([joined(upper), joined(lower)])


def test_traced_steps_are_those_without() -> None:
    found = trained(SABA(compile="aot_eager"))
    assert torch.allclose(found, trained(SABA()), rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("method", [SOBA(), MRBO(0.3, terms=2), F2SA()], ids=["SOBA", "MRBO", "F2SA"])
def test_steps_of_compiled_code_are_those_without(method: SingleLoop) -> None:
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    found = trained(replace(method, compile=True))
    assert torch.allclose(found, trained(method), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", SAMPLED.values(), ids=SAMPLED.keys())
def test_the_functions_that_are_compiled_give_the_same(method: SingleLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass after the first step is one of theirs."""
    calls: list[str] = []

    def counting(function: Any, backend: str, problem: Problem, *arguments: Any) -> Any:
        calls.append(f"{function.__name__} {backend}")
        return function(problem, *arguments)

    monkeypatch.setattr("bilevel.lower.samples.compiled.compiled", counting)
    wanted = trained(method)
    assert not calls
    assert torch.allclose(trained(replace(method, compile=True)), wanted, rtol=1e-10)
    assert {call.split()[1] for call in calls} == {"inductor"}
    assert calls.count("upper inductor") >= 5
    if isinstance(method, SOBA):
        assert calls == ["lower inductor", "upper inductor"] * 5


class Regression(Problem):
    def __init__(self, net: nn.Module, call: Any) -> None:
        self.net, self.call = net, call

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return (self.call(self.net, lower, batch) * upper["x"].exp()).square().mean()

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return self.call(self.net, lower, batch).square().mean() + upper["x"].square()


def net_trained(net: nn.Module, call: Any, method: SingleLoop) -> Tensor:
    net.double()
    lower = {name: p.detach().clone() for name, p in net.named_parameters()}
    upper = {"x": torch.zeros((), dtype=torch.float64)}
    data = [vector(12, 3).reshape(4, 3)]
    Trainer(
        Regression(net, call),
        Level(upper, torch.optim.SGD(upper.values(), lr=0.1), data),
        Level(lower, torch.optim.SGD(lower.values(), lr=0.1), data),
        AlternatingSchedule(1, 0, 3),
        method,
    ).run()
    return torch.cat([upper["x"].reshape(1), joined(lower)])


def test_modules_go_by_torchs_functional_call() -> None:
    torch.manual_seed(0)
    net, method = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), SOBA(compile="aot_eager")
    found = net_trained(net, torch.func.functional_call, method)
    assert torch.allclose(found, net_trained(net, functional_call, SOBA()), rtol=1e-10)
    with pytest.raises(RuntimeError, match=r"compile: torch.compile cannot take the objectives of Regression whole"):
        net_trained(net, functional_call, method)


def test_random_masks_are_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    with pytest.raises(ValueError, match=r"SOBA: compile=True is for objectives that draw no random numbers"):
        net_trained(net, torch.func.functional_call, SOBA(compile=True))


def test_what_is_no_choice_is_refused() -> None:
    choice: Any = 1.5
    with pytest.raises(TypeError, match=r"SOBA: compile must be True, False or the name of a backend, got 1.5"):
        trained(SOBA(compile=choice))
