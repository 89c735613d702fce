"""Lets the metrics of torchmetrics stand beside those of `metrics`."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel.tree import tensors_in

from ..experiment.plugins import PluginError
from .metrics import Metric, State


def as_metrics(given: Mapping[str, Any]) -> dict[str, Metric]:
    """The metrics of a task by name: a `Metric` as it is, a ``torchmetrics.Metric`` as a `Metric`.

    A metric of torchmetrics starts empty, is updated by the outputs and targets of each batch on their device, and
    its value stays as it is: most are shares of 1 where those of `metrics` are percentages. Where any output is NaN
    so is the value, since torchmetrics may count a NaN score as a right answer. Over several processes each of them is
    given the whole set, so that nothing is exchanged.

    Raises:
        PluginError: there is no metric, one is of another type or does not say whether higher values are better; or,
            when it is computed, its value is not a single number.
    """
    if not given:
        raise PluginError("metrics: the task has none; return at least one, the first of which chooses the best epoch")
    return {name: metric if isinstance(metric, Metric) else _adapted(name, metric) for name, metric in given.items()}


def _adapted(name: str, given: Any) -> Metric:
    what = f"metrics: {name!r} is a {type(given).__name__}"
    try:
        import torchmetrics
    except ImportError as error:
        raise PluginError(
            f"{what}, no bilevel.recipes.vision.metrics.Metric, and torchmetrics is not installed"
        ) from error
    if not isinstance(given, torchmetrics.Metric):
        raise PluginError(
            f"{what}, neither a bilevel.recipes.vision.metrics.Metric nor a torchmetrics.Metric; return one"
        )
    if given.higher_is_better is None:
        raise PluginError(
            f"{what}, which does not say whether higher values are better; return one of a subclass with "
            "higher_is_better = True or False"
        )

    def start(device: torch.device) -> State:
        fresh = copy.deepcopy(given).to(device)
        for part in fresh.modules():
            if isinstance(part, torchmetrics.Metric):
                # Every rank has the outputs of the whole set: gathered from all of them, each row would count again.
                part.distributed_available_fn = _never
        fresh.reset()
        return fresh, torch.zeros((), dtype=torch.bool, device=device)

    def accumulate(state: State | None, outputs: Any, targets: Any) -> State:
        metric, undefined = start(next(tensors_in(outputs)).device) if state is None else state
        metric.update(outputs, targets)
        for tensor in tensors_in(outputs):
            undefined = undefined | tensor.isnan().any()
        return metric, undefined

    def compute(state: State) -> float:
        metric, undefined = state
        value = metric.compute()
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise PluginError(f"{what}, whose value is not a single number; have it average over classes or outputs")
        return math.nan if undefined else float(value)

    return Metric(accumulate, compute, given.higher_is_better)


def _never() -> bool:
    return False
