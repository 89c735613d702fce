"""What levels, schedules, batches and callbacks refuse: one sentence that names the argument and what came."""

# The wrong kinds are the point here.
# pyright: reportArgumentType=false

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import AlternatingSchedule, BatchStack, Checkpointing, Level, ProgressBar
from bilevel.training import Cycle, Diagnostics, Inspect, JSONLWriter, TensorBoardLogger, WandbLogger


@dataclass
class Points:
    indices: Tensor
    seed: int


def level(**given: Any) -> Level:
    params = {"w": torch.zeros(2)}
    made = {"params": params, "optimizer": torch.optim.SGD(params.values(), 0.1), "data": [None]}
    return Level(**(made | given))


def stack(**given: Any) -> BatchStack:
    return BatchStack(**({"size": 5, "batch_size": 1, "load": lambda indices, seed: indices, "seed": 0} | given))


def schedule(**given: Any) -> AlternatingSchedule:
    return AlternatingSchedule(3, 2, 1, **given)


ROWS = [
    (lambda: level(scheduler=5), TypeError, r"^Level: scheduler must be a schedule .* with step, .*, or None, got 5$"),
    (
        lambda: level(scheduler=torch.optim.lr_scheduler.StepLR),
        TypeError,
        "^Level: scheduler must be a schedule .*, got the class StepLR$",
    ),
    (lambda: level(data=[]), ValueError, "^Level: data is empty; pass at least one batch$"),
    (lambda: level(params={}), ValueError, "^Level: params must hold at least one tensor, got {}; pass .* by name$"),
    (lambda: Cycle([]), ValueError, "^Cycle: batches is empty; pass at least one batch$"),
    (lambda: Cycle("ab"), TypeError, "^Cycle: batches must be a list or tuple of batches, got 'ab'$"),
    *(
        (
            lambda value=value: schedule(adaptation_strength=value),
            ValueError,
            rf"strength must be .* at most 1, got {shown}$",
        )
        for value, shown in [("a", "'a'"), (None, "None"), (True, "True"), (1.5, "1.5"), (float("nan"), "nan")]
    ),
    (lambda: schedule(adaptation_pairs=["w"]), TypeError, r"pairs must be a mapping, upper name -> .*, got \['w'\]$"),
    (lambda: stack(size="5"), ValueError, "^BatchStack: size must be a whole number of at least 1, got '5'$"),
    (lambda: stack(size=5.5), ValueError, "^BatchStack: size must be a whole number of at least 1, got 5.5$"),
    (lambda: stack(batch_size=None), ValueError, "^BatchStack: batch_size must be a whole number .*, got None$"),
    (lambda: stack(load=None), TypeError, "^BatchStack: load must be a function of the points' indices .*, got None$"),
    (lambda: stack(seed=None), ValueError, "^BatchStack: seed must be a whole number of at least 0, got None$"),
    (lambda: stack(seed=1.5), ValueError, "^BatchStack: seed must be a whole number of at least 0, got 1.5$"),
    (lambda: stack(drop_last="no"), TypeError, "^BatchStack: drop_last must be True or False, got 'no'$"),
    (lambda: Checkpointing(None), TypeError, "^Checkpointing: directory must be a path, got None$"),
    (lambda: JSONLWriter(None), TypeError, "^JSONLWriter: path must be a path, got None$"),
    (lambda: JSONLWriter("x", "y"), TypeError, "^JSONLWriter: context must be a mapping .*, or None, got 'y'$"),
    (lambda: Inspect(None), TypeError, "^Inspect: directory must be a path, got None$"),
    (lambda: TensorBoardLogger(None), TypeError, "^TensorBoardLogger: folder must be a path, got None$"),
    (lambda: WandbLogger(None, project="p"), TypeError, "^WandbLogger: folder must be a path, got None$"),
    (
        lambda: WandbLogger("x", project="p", config="y"),
        TypeError,
        "^WandbLogger: config must be a mapping .*, got 'y'$",
    ),
    (lambda: ProgressBar("x"), TypeError, "^ProgressBar: console must be a rich.console.Console, or None, got 'x'$"),
    (lambda: Diagnostics(5), TypeError, "^Diagnostics: console must be a rich.console.Console, or None, got 5$"),
    (lambda: Diagnostics(every=1.5), ValueError, "every must be a whole number .* 1, or None for no lines, got 1.5$"),
    (lambda: Diagnostics(every="x"), ValueError, "every must be a whole number .* 1, or None for no lines, got 'x'$"),
]


@pytest.mark.parametrize(("make", "error", "message"), ROWS, ids=[message for _, _, message in ROWS])
def test_is_refused_in_a_sentence(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_what_is_meant_is_taken() -> None:
    params = {"w": torch.zeros(2)}
    optimizer = torch.optim.SGD(params.values(), 0.1)
    rates = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    assert Level(params, optimizer, [None], scheduler=rates).scheduler is rates
    for strength in (0, 0.5, 1):
        assert schedule(adaptation_strength=strength).adaptation_strength == strength
    # What can be called is a function: here a class.
    assert stack(load=Points).next().indices.shape == (1,)
