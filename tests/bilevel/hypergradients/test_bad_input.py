"""What hypergradients, linear systems and updates refuse: one sentence that names the argument and what came."""

# The wrong kinds are the point here.
# pyright: reportArgumentType=false

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from bilevel import OneStep, Params, Problem, SGDUpdate, check_hypergradient, hypergradient, linearize
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
