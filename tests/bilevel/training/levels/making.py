"""Levels of two variables with any optimizer and schedule."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from bilevel import Level, Params

Make = Callable[[Optimizer], Any]


def none(optimizer: Optimizer) -> None:
    """No schedule, or no callback."""


def level(make: Callable[[Params], Optimizer], schedule: Make = none) -> Level:
    params = {"w": torch.zeros(2, requires_grad=True), "b": torch.zeros(1, requires_grad=True)}
    optimizer = make(params)
    return Level(params, optimizer, [None], scheduler=schedule(optimizer))
