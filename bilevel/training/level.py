"""One level of a training: its variables, what changes them, and where its batches come from."""

import copy
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, Protocol, final, runtime_checkable

import torch

from bilevel import tree
from bilevel.checks import check_count, check_kind, check_number, check_variables, same_structure
from bilevel.training.batches import BatchSource, as_source
from bilevel.tree import Params


@runtime_checkable
class LRSchedule(Protocol):
    """A learning-rate schedule, stepped once after every optimizer step (any of torch.optim.lr_scheduler)."""

    def step(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@final
class Level:
    """Variables with their optimizer, data and learning-rate schedule. They change in place, and live as long as the
    training.

    Args:
        params: leaf tensors by name.
        optimizer: any of torch.optim, holding exactly these tensors.
        data: a `BatchSource`, or a list or tuple of batches that is cycled through.
        scheduler: stepped once after each of the level's steps.
        max_grad_norm: the level's whole gradient is scaled down to this Euclidean norm where it is longer.
        micro_batch: samples a chunk of a lower step, whose memory is then a chunk's (`micro_batched_gradient`; the
            Problem must define `lower_outputs` and `lower_output_loss`). None passes the batch at once. Solves are
            chunked by ``hvp=MicroBatched(...)``.

    Raises:
        TypeError: an argument of another kind.
        ValueError: no variables or batches, frozen variables (requires_grad=False beside others that require
            gradients), variables that share memory, an optimizer with other tensors, or a number out of its range.
    """

    def __init__(
        self,
        params: Params,
        optimizer: torch.optim.Optimizer,
        data: BatchSource | Sequence[Any],
        *,
        scheduler: LRSchedule | None = None,
        max_grad_norm: float | None = None,
        micro_batch: int | None = None,
    ) -> None:
        check_variables("Level: params", params)
        if not params:
            raise ValueError("Level: params must hold at least one tensor, got {}; pass the level's variables by name")
        check_kind("Level: optimizer", optimizer, torch.optim.Optimizer, "an optimizer of torch.optim")
        remedy = "a schedule of torch.optim.lr_scheduler, with step, state_dict and load_state_dict, or None"
        check_kind("Level: scheduler", scheduler, (LRSchedule, NoneType), remedy)
        if max_grad_norm is not None:
            check_number("Level: max_grad_norm", max_grad_norm, positive=True)
        if micro_batch is not None:
            check_count("Level: micro_batch", micro_batch, least=1)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [name for name, leaf in params.items() if id(leaf) not in held]
        if missing or len(held) != len(params):
            raise ValueError(
                f"Level: the optimizer must hold exactly the {len(params)} tensors of params; it holds {len(held)} and "
                f"misses {missing[:3]}. Build it from list(params.values())"
            )
        self.params, self.optimizer, self.data = params, optimizer, as_source("Level: data", data)
        self.scheduler, self.max_grad_norm, self.micro_batch = scheduler, max_grad_norm, micro_batch

    @property
    def rate(self) -> float:
        """The first parameter group's learning rate."""
        return float(self.optimizer.param_groups[0]["lr"])

    def descend(self, gradient: Params, norm: float, *, limit_scale: float = 1.0) -> None:
        """One step along `gradient`, whose Euclidean norm is `norm`; the norm limit is `limit_scale` times as wide."""
        limit = None if self.max_grad_norm is None else limit_scale * self.max_grad_norm
        if limit is not None and norm > limit:
            gradient = tree.scale(limit / norm, gradient)
        for name, variable in self.params.items():
            variable.grad = gradient[name]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.step()

    @torch.no_grad()
    def restart(self, values: Params) -> None:
        """Start from `values` with an optimizer that has seen nothing; the schedule goes on.

        Raises:
            ValueError: a value of no variable, or of another shape.
        """
        for name, value in values.items():
            if name not in self.params or value.shape != self.params[name].shape:
                raise ValueError(
                    f"Problem.reset_lower gave {name!r} of shape {tuple(value.shape)}; it must give values of lower "
                    f"variables, {[(n, tuple(t.shape)) for n, t in self.params.items()][:4]} ..., or None"
                )
        for name, value in values.items():
            self.params[name].copy_(value)
        self.optimizer.state.clear()

    def state_dict(self) -> dict[str, Any]:
        """Copies of the variables and of the optimizer's and the schedule's state; the data's is the training's."""
        return {
            "variables": {name: leaf.detach().clone() for name, leaf in self.params.items()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "kind": type(self.optimizer).__name__,
            "scheduler": None if self.scheduler is None else copy.deepcopy(self.scheduler.state_dict()),
        }

    @property
    def _kind(self) -> tuple[str, int]:
        return type(self.optimizer).__name__, len(self.optimizer.param_groups)

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError where the state is of another level."""
        if not same_structure(state["variables"], self.params):
            raise ValueError("the state's variables have other names or shapes than this training's")
        saved, own = (state["kind"], len(state["optimizer"]["param_groups"])), self._kind
        if saved != own:
            raise ValueError(
                f"optimizer: the state is of {saved[0]} with {saved[1]} parameter group(s), this level has {own[0]} "
                f"with {own[1]}; make the level as it was made then"
            )
        if (state["scheduler"] is None) != (self.scheduler is None):
            there, here = ("one", "none") if self.scheduler is None else ("none", "one")
            raise ValueError(f"scheduler: the state has {there}, this level {here}; make the level as it was made then")

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`, in place. Learning rates and other options of the optimizer are those of the state.

        Raises:
            ValueError: the state is of another level.
        """
        self.check_state(state)
        for name, leaf in self.params.items():
            leaf.copy_(state["variables"][name])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
