"""What hypergradients, linear systems and updates refuse: one sentence that names the argument and what came."""

# The wrong kinds are the point here.
# pyright: reportArgumentType=false

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from bilevel import (
    OneStep,
    Params,
    Problem,
    SGDUpdate,
    check_hypergradient,
    hypergradient,
    linearize,
    lower_solution,
)
from bilevel.hypergradients import AdamUpdate


class Plain(Problem):
    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return (lower["y"] - upper["x"]).square().sum()

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return lower["y"].square().sum()


X, Y = {"x": torch.ones(2)}, {"y": torch.zeros(2)}


def one(problem: Any) -> object:
    return hypergradient(problem, X, Y, upper_batch=None, lower_batches=[None])


def checked(problem: Any, lower_solver: Any) -> object:
    return check_hypergradient(problem, X, Y, upper_batch=None, lower_batches=[None], lower_solver=lower_solver)


LOADER = DataLoader(TensorDataset(torch.ones(4)))


def on(lower_batches: Any, upper_batch: Any = None) -> list[Callable[[], object]]:
    """What takes lower batches, and unless it is None an upper one, with these."""
    both: dict[str, Any] = {"upper_batch": upper_batch, "lower_batches": lower_batches}
    calls: list[Callable[[], object]] = [
        lambda: hypergradient(Plain(), X, Y, **both),
        lambda: hypergradient(Plain(), X, Y, OneStep(), **both),
        lambda: check_hypergradient(Plain(), X, Y, lower_solver=lambda *given: Y, **both),
    ]
    if upper_batch is None:
        return [*calls, lambda: linearize(Plain(), X, Y, lower_batches)]
    return [*calls, lambda: linearize(Plain(), X, Y, lower_batches).hypergradient(upper_batch)]


FIXED = (
    r"^lower_batches must be a sequence of batches, got {}; the linear system is that of a few fixed batches: pass list"
)
NOT_ONE = r": a DataLoader is no batch; pass next\(iter\(loader\)\) in its place$"
NO_PROBLEM = "^problem must be an instance of a Problem, got "
ROWS = [
    (lambda: linearize(None, X, Y, [None]), TypeError, f"{NO_PROBLEM}None$"),
    (lambda: linearize(Plain, X, Y, [None]), TypeError, f"{NO_PROBLEM}the class Plain$"),
    (lambda: one(None), TypeError, f"{NO_PROBLEM}None$"),
    (lambda: one(Plain), TypeError, f"{NO_PROBLEM}the class Plain$"),
    (lambda: checked(None, lambda *given: Y), TypeError, f"{NO_PROBLEM}None$"),
    (lambda: checked(Plain(), None), TypeError, "^lower_solver must be a function of the problem, .*, got None$"),
    (lambda: SGDUpdate(0.1, nesterov="x"), TypeError, "^SGDUpdate: nesterov must be True or False, got 'x'$"),
    (lambda: AdamUpdate(0.1, decoupled=1), TypeError, "^AdamUpdate: decoupled must be True or False, got 1$"),
    (lambda: AdamUpdate(0.1, betas=0.9), TypeError, r"^AdamUpdate: betas must be two numbers, .*, got 0\.9$"),
    (
        lambda: AdamUpdate(0.1, betas=(0.9, 0.9, 0.9)),
        ValueError,
        r"betas must be two numbers, .*, got \(0.9, 0.9, 0.9\)$",
    ),
    *(
        (call, TypeError, FIXED.format("DataLoader") + r"\(itertools.islice\(lower_batches, K\)\)")
        for call in on(LOADER)
    ),
    *((call, TypeError, FIXED.format("_SingleProcessDataLoaderIter")) for call in on(iter(LOADER))),
    *((call, TypeError, "got TensorDataset; draw batches of it: list") for call in on(LOADER.dataset)),
    *((call, TypeError, f"^lower_batches{NOT_ONE}") for call in on([LOADER])),
    *((call, TypeError, f"^upper_batch{NOT_ONE}") for call in on([None], LOADER)),
]


@pytest.mark.parametrize(("make", "error", "message"), ROWS)
def test_is_refused_in_a_sentence(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


class Regression(Problem):
    """Takes a batch (X, t)."""

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        inputs, targets = batch
        return (inputs @ lower["y"] - targets).square().mean() + (upper["x"].exp() * lower["y"] ** 2).sum()

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        inputs, targets = batch
        return (inputs @ lower["y"] - targets).square().mean()


INPUTS, TARGETS = torch.linspace(-1.0, 1.0, 6).reshape(3, 2), torch.ones(3)


def everywhere(lower_batches: Any) -> list[Callable[[], object]]:
    """Every public function that takes lower batches of a regression."""
    calls: dict[str, Any] = {"upper_batch": (INPUTS, TARGETS), "lower_batches": lower_batches}
    moving = {"x": torch.ones(2, requires_grad=True)}

    def solver(problem: Problem, upper: Params, lower: Params, batches: Any) -> Params:
        problem.lower_objective(upper, lower, batches[0])
        return Y

    return [
        lambda: hypergradient(Regression(), X, Y, **calls),
        lambda: hypergradient(Regression(), X, Y, OneStep(0.1), **calls),
        lambda: linearize(Regression(), X, Y, lower_batches),
        lambda: lower_solution(Regression(), moving, Y, lower_batches),
        lambda: check_hypergradient(Regression(), X, Y, lower_solver=solver, **calls),
    ]


@pytest.mark.parametrize(
    ("parts", "shown"),
    [
        ((INPUTS, TARGETS), r"float32 \[3, 2\], float32 \[3\]"),
        ([INPUTS, TARGETS.long()], r"float32 \[3, 2\], int64 \[3\]"),
        ((INPUTS, INPUTS.double()), r"float32 \[3, 2\], float64 \[3, 2\]"),
    ],
)
def test_the_parts_of_one_batch_are_no_batches(parts: Any, shown: str) -> None:
    said = rf"^lower_batches .* got tensors of {shown}, .* pass \[batch\].* \[\(X, t\)\]$"
    for call in everywhere(parts):
        with pytest.raises(TypeError, match=said):
            call()
    with pytest.raises(TypeError, match=r"\[\(part_1, part_2, part_3\)\]$"):
        linearize(Regression(), X, Y, (INPUTS, TARGETS, TARGETS.long()))


def test_an_objective_that_fails_on_parts_that_look_alike_says_how_they_were_read() -> None:
    alike = (INPUTS, torch.ones(3, 1))
    # Three rows do not unpack into two parts.
    for call in everywhere(alike):
        with pytest.raises(ValueError, match="too many values to unpack") as caught:
            call()
        assert caught.value.__notes__ == [
            "lower_batches was taken as 2 batches of one tensor each; if these are the parts of one batch, pass "
            "[(X, t)]"
        ]
    for call in everywhere([(INPUTS, TARGETS, TARGETS)]):
        with pytest.raises(ValueError, match="too many values to unpack") as caught:
            call()
        assert not hasattr(caught.value, "__notes__")
    for call in everywhere([(INPUTS, TARGETS)]):
        call()
