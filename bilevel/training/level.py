"""One level of a trainer: its variables and what changes them."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bilevel import tree
from bilevel.tree import Params


class NonFiniteError(RuntimeError):
    """A loss or gradient was NaN or infinite; raised before the optimizer's step, so that no variable has changed."""


class LRSchedule(Protocol):
    """A learning-rate schedule, stepped once after every optimizer step (any of torch.optim.lr_scheduler)."""

    def step(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Level:
    """Variables with their optimizer and learning-rate schedule."""

    name: str
    variables: Params
    optimizer: torch.optim.Optimizer
    scheduler: LRSchedule | None

    @property
    def rate(self) -> float:
        """The first parameter group's learning rate."""
        return float(self.optimizer.param_groups[0]["lr"])

    def descend(self, gradient: Params, norm: float, limit: float | None) -> None:
        """One step along `gradient`, whose Euclidean norm is `norm` and is scaled down to `limit` where it is more."""
        if limit is not None and norm > limit:
            gradient = tree.scale(limit / norm, gradient)
        for name, variable in self.variables.items():
            variable.grad = gradient[name]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.step()

    @torch.no_grad()
    def restart(self, values: Params) -> None:
        """Start from `values` with an optimizer that has seen nothing; the schedule goes on."""
        for name, value in values.items():
            self.variables[name].copy_(value)
        self.optimizer.state.clear()

    def state_dict(self) -> dict[str, Any]:
        """Copies of the variables and of the optimizer's and the schedule's state."""
        return {
            "variables": {name: leaf.detach().clone() for name, leaf in self.variables.items()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "scheduler": None if self.scheduler is None else copy.deepcopy(self.scheduler.state_dict()),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`, in place.

        Raises:
            ValueError: the state has other variables than this level.
        """
        saved = state["variables"]
        if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in self.variables.items()}:
            raise ValueError(f"{self.name}: the state's variables have other names or shapes than this trainer's")
        for name, leaf in self.variables.items():
            leaf.copy_(saved[name])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
