"""Buffers that lower steps write: whether a checkpoint holds them."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from torch import Tensor, nn

from bilevel.nn import noting_writers
from bilevel.problem import Problem, modules_of


class WrittenBuffers:
    """The modules whose buffers steps have written, each examined once."""

    def __init__(self) -> None:
        self._written = WeakKeyDictionary[nn.Module, set[str]]()
        self._examined = WeakSet[nn.Module]()

    def noted(self) -> AbstractContextManager[None]:
        """Inside, modules that write to their buffers are noted."""
        return noting_writers(self._written)

    def warn_of_lost(self, problem: Problem, state: Mapping[str, Any]) -> None:
        """Say once which modules' buffers steps have written and the Problem's `state` does not hold."""
        new = [module for module in self._written if module not in self._examined]
        if not new:
            return
        self._examined.update(new)
        if type(problem).state_dict is Problem.state_dict:
            saved = {id(layer) for module in modules_of(problem).values() for layer in module.modules()}
            lost, remedy = [module for module in new if id(module) not in saved], "define its"
        else:
            numbers = _Numbers(state)
            lost, remedy = [module for module in new if not self._is_held(module, numbers)], "put them into its"
        if lost:
            warnings.warn(
                f"lower steps have written buffers of {sorted({type(module).__name__ for module in lost})}, which no "
                "checkpoint holds: a resumed training would go on with others. Make the modules attributes of the "
                f"Problem, or {remedy} state_dict and load_state_dict",
                stacklevel=3,
            )

    def _is_held(self, module: nn.Module, numbers: "_Numbers") -> bool:
        names = self._written[module]
        return all(numbers.hold(buffer) for name, buffer in module.named_buffers() if name in names)


class _Numbers:
    """All the numbers in a state of any structure."""

    def __init__(self, state: object) -> None:
        self.tensors: list[tuple[Tensor, float]] = []
        self.is_known = True
        for leaf in _leaves(state):
            if isinstance(leaf, (Tensor, np.ndarray, bool, int, float)):
                tensor = torch.as_tensor(leaf, dtype=torch.float64 if isinstance(leaf, (int, float)) else None)
                rounding = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0
                self.tensors.append((_flat(tensor), rounding))
            elif not isinstance(leaf, (str, type(None))):
                # Of other objects nobody can tell what they hold.
                self.is_known = False

    def hold(self, buffer: Tensor) -> bool:
        """Whether the buffer's values are here, as one tensor of whatever shape or among others."""
        values = _flat(buffer)
        if not self.is_known or not values.numel():
            return True
        for tensor, rounding in self.tensors:
            if len(tensor) == len(values) and torch.allclose(tensor, values, rtol=rounding, atol=0.0, equal_nan=True):
                return True
        everything = torch.cat([torch.zeros(0, dtype=torch.float64), *(tensor for tensor, _ in self.tensors)])
        return bool(torch.isin(values.nan_to_num(), everything.nan_to_num()).all())


def _leaves(state: object) -> Iterator[object]:
    if isinstance(state, Mapping):
        for item in state.values():
            yield from _leaves(item)
    elif isinstance(state, (list, tuple, set, frozenset)):
        for item in state:
            yield from _leaves(item)
    else:
        yield state


def _flat(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1).cpu().double()
