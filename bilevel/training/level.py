"""One level of a training: its variables, what changes them, and where its batches come from."""

import copy
import inspect
import io
import math
import pickle
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType
from typing import Any, Protocol, final, runtime_checkable

import torch
from torch.optim.lr_scheduler import OneCycleLR, SequentialLR
from torch.utils.data import DataLoader

from bilevel import tree
from bilevel.checks import check_count, check_kind, check_number, check_variables, same_structure
from bilevel.lower import Draw
from bilevel.problem import Problem
from bilevel.training.data.batches import BatchSource
from bilevel.training.data.sources import as_source
from bilevel.tree import Params


@runtime_checkable
class LRSchedule(Protocol):
    """A learning-rate schedule, stepped without arguments once after every optimizer step (any of
    torch.optim.lr_scheduler but ReduceLROnPlateau, which needs a metric)."""

    def step(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@final
class Level:
    """Variables with their optimizer, data and learning-rate schedule. They change in place, and live as long as the
    training.

    Args:
        params: leaf tensors by name.
        optimizer: any of torch.optim that steps from dense gradients (not LBFGS, SparseAdam), holding exactly these
            tensors; it minimises.
        data: a ``torch.utils.data.DataLoader``, iterated pass after pass and resumed where it was (`LoaderSource`); a
            list or tuple of batches, which is cycled through; or a `BatchSource`.
        scheduler: of this optimizer, stepped once after each of the level's steps. Chained and sequential ones, and
            those that cycle the momentum, included; one of your own without an attribute `optimizer` is taken at its
            word. A checkpoint holds its numbers; its functions are those it was made with anew.
        max_grad_norm: the level's whole gradient is scaled down to this Euclidean norm where it is longer.
        micro_batch: samples a chunk of a lower step, whose memory is then a chunk's (`micro_batched_gradient`; the
            Problem must define `lower_outputs` and `lower_output_loss`). None passes the batch at once. Solves are
            chunked by ``hvp=MicroBatched(...)``.

    Attributes:
        waited: seconds that this process has waited for batches of the data, since the level was made.

    Raises:
        TypeError: an argument of another kind.
        ValueError: no variables or batches, variables of the meta device or with entries that share memory, frozen
            variables (requires_grad=False beside others that require gradients), variables that share memory, an
            optimizer with other tensors or one that steps otherwise, a schedule that needs arguments, belongs to
            another optimizer or cannot be kept in a checkpoint, or a number out of its range.
    """

    def __init__(
        self,
        params: Params,
        optimizer: torch.optim.Optimizer,
        data: DataLoader[Any] | BatchSource | Sequence[Any],
        *,
        scheduler: LRSchedule | None = None,
        max_grad_norm: float | None = None,
        micro_batch: int | None = None,
    ) -> None:
        tree.check_params("Level: params", params)
        _check_memory(params)
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
        _check_optimizer(optimizer, params)
        if scheduler is not None:
            _check_scheduler(scheduler, optimizer)
        self.params, self.optimizer, self.data = params, optimizer, as_source("Level: data", data)
        self.scheduler, self.max_grad_norm, self.micro_batch = scheduler, max_grad_norm, micro_batch
        self.waited = 0.0

    def next_batch(self) -> Any:
        """The data's next batch; `waited` counts the seconds that it took."""
        began = time.perf_counter()
        try:
            return self.data.next()
        finally:
            self.waited += time.perf_counter() - began

    def draw(self, seed: int) -> Draw:
        """The data's next batch as a sample whose random masks are those of `seed`; a block with its weight, where the
        data are cut into fixed blocks."""
        batch, block, blocks = self.next_batch(), self.data.last_block, self.data.blocks
        if block is None or blocks is None:
            return Draw(batch, seed)
        return Draw(batch, seed, block, blocks.weight(block))

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
        for variable in self.params.values():
            variable.grad = None
        if self.scheduler is not None:
            self.scheduler.step()

    def check_planned(self, steps: int) -> None:
        """Raise ValueError where the schedule ends before `steps` further steps."""
        for left, cycle in _ends(self.scheduler):
            if steps > left:
                raise ValueError(
                    f"scheduler: OneCycleLR ends after {left} more steps (total_steps={cycle.total_steps}), and "
                    f"{steps} are to be made; pass it as many total_steps as the training has steps of this level, or "
                    "in a SequentialLR as there are steps before the next milestone"
                )

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
            "schedule": _schedule(self.scheduler),
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
        there, here = state["schedule"], _schedule(self.scheduler)
        if there != here:
            raise ValueError(
                f"scheduler: the state has {there or 'none'}, this level {here or 'none'}; make the level as it was "
                "made then"
            )

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`, in place. Options of the optimizer and numbers of the schedule, learning rates among
        them, are those of the state; the schedule's functions are its own.

        Raises:
            ValueError: the state is of another level.
        """
        self.check_state(state)
        for name, leaf in self.params.items():
            leaf.copy_(state["variables"][name])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])


def check_pair(problem: Problem, upper: Level, lower: Level) -> None:
    """Refuse two levels that cannot be trained together; warn of a weight decay that no objective knows.

    Raises:
        ValueError: naming what both have, or what one of them cannot have.
    """
    if upper is lower:
        raise ValueError("upper and lower are the same Level; give each its own variables and optimizer")
    levels = {"upper": upper.params, "lower": lower.params}
    named = [(f"{level}[{name!r}]", leaf) for level, params in levels.items() for name, leaf in params.items()]
    both = tree.overlapping(named)
    if both is not None:
        raise ValueError(
            f"{both[0]} and {both[1]} share memory, so that a step of one level would move the other's variable; "
            "give one of them a memory of its own, by clone() or copy.deepcopy(module)"
        )
    if upper.micro_batch is not None:
        raise ValueError("upper: micro_batch is for the steps of the lower level; leave it out here")
    if lower.micro_batch is not None and type(problem).lower_outputs is Problem.lower_outputs:
        raise ValueError(
            f"lower: micro_batch needs lower_outputs and lower_output_loss, which {type(problem).__name__} does "
            "not define; define both, or leave micro_batch out"
        )
    if any(group.get("weight_decay", 0.0) for group in lower.optimizer.param_groups):
        warnings.warn(
            "the lower optimizer's weight decay is not part of the lower objective: stationarity will not reach 0, "
            "and the hypergradient is that of the objective without it",
            stacklevel=3,
        )


def _check_memory(params: Params) -> None:
    """Raise ValueError for tensors without numbers, and for those that a step cannot write to entry by entry."""
    for name, leaf in params.items():
        if leaf.is_meta:
            raise ValueError(
                f"Level: params[{name!r}] is on the meta device, which keeps no numbers; make the variables on the "
                "device that they are trained on, for a module by to_empty(device=...) and its initialisation"
            )
        if tree.overlaps_itself(leaf):
            raise ValueError(
                f"Level: params[{name!r}] has shape {tuple(leaf.shape)} and strides {leaf.stride()}, so that some of "
                "its entries are the same memory and no step could move them apart; pass its clone(), or make the "
                "smaller tensor the variable and expand it in the objectives"
            )


def _check_optimizer(optimizer: torch.optim.Optimizer, params: Params) -> None:
    """Raise ValueError unless a step from dense gradients descends along them, for exactly these tensors."""
    kind, groups = type(optimizer).__name__, optimizer.param_groups
    # The instance's own step may be wrapped by a schedule; the class's has `self` first.
    needed = _required(type(optimizer).step)[1:]
    if needed:
        raise ValueError(
            f"Level: optimizer: {kind}.step needs {needed[0]!r}, and a level steps from one gradient, checked before "
            "anything changes; take an optimizer that does, such as torch.optim.SGD or Adam, or solve the lower level "
            "in a loop of your own and call hypergradient"
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise ValueError(f"Level: optimizer: {kind} takes sparse gradients alone; take torch.optim.Adam")
    if any(group.get("maximize") for group in groups):
        raise ValueError(
            "Level: optimizer: maximize=True climbs, and both levels are minimised; leave it out, and return the "
            "negative of what shall grow from the objective"
        )
    if any(group.get("differentiable") for group in groups):
        raise ValueError(
            "Level: optimizer: differentiable=True records steps, and variables change in place here; leave it out "
            "(Unrolled differentiates lower steps by itself)"
        )
    tensors = [tensor for group in groups for tensor in group["params"]]
    if any(group.get("capturable") for group in groups) and any(tensor.device.type == "cpu" for tensor in tensors):
        raise ValueError(
            "Level: optimizer: capturable=True is for variables on a GPU, some are on the CPU; leave it out"
        )
    held = {id(tensor) for tensor in tensors}
    missing = [name for name, leaf in params.items() if id(leaf) not in held]
    if missing or len(held) != len(params):
        raise ValueError(
            f"Level: the optimizer must hold exactly the {len(params)} tensors of params; it holds {len(held)} and "
            f"misses {missing[:3]}. Build it from list(params.values())"
        )
    if len(tensors) != len(held):
        raise ValueError(
            f"Level: optimizer: it holds {len(tensors)} entries for {len(held)} tensors, and would step some of them "
            "more than once; build it from list(params.values())"
        )


def _check_scheduler(scheduler: LRSchedule, optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError unless the schedule steps without arguments, is the optimizer's and fits into a checkpoint."""
    kind = type(scheduler).__name__
    needed = _required(scheduler.step)
    if needed:
        raise ValueError(
            f"Level: scheduler: {kind}.step needs {needed[0]!r}, and a level's schedule is stepped without arguments "
            "after every step; leave it out here, and step it in a callback's on_progress, with the metric or count "
            "that shall decide"
        )
    own = getattr(scheduler, "optimizer", None)
    # A wrapper around an optimizer shares the groups, which are what a schedule changes.
    if isinstance(own, torch.optim.Optimizer) and own.param_groups is not optimizer.param_groups:
        raise ValueError(
            f"Level: scheduler: this {kind} is of another optimizer, a {type(own).__name__}, and would change nothing "
            f"here; build it from the level's own {type(optimizer).__name__}"
        )
    file = io.BytesIO()
    try:
        torch.save(scheduler.state_dict(), file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"Level: scheduler: the state_dict of {kind} holds something else than tensors and plain values "
            f"({reason}), which no checkpoint could give back; leave functions and objects out of it, and make them "
            "anew with the schedule"
        ) from error


def _schedule(scheduler: object) -> str | None:
    """In words, of what kind a schedule is, and of what kinds the ones it is made of."""
    if scheduler is None:
        return None
    # torch has no public name for the parts.
    parts = [str(_schedule(part)) for part in getattr(scheduler, "_schedulers", [])]
    return type(scheduler).__name__ + (f"({', '.join(parts)})" if parts else "")


def _ends(scheduler: object) -> Iterator[tuple[int, OneCycleLR]]:
    """After how many more steps the cycles in a schedule end, each that would be stepped on after its end."""
    if isinstance(scheduler, OneCycleLR):
        # A sequence sets a part that has not begun to its first step.
        yield scheduler.total_steps - max(scheduler.last_epoch, 0), scheduler
    elif isinstance(scheduler, SequentialLR):
        now, milestones = scheduler.last_epoch, getattr(scheduler, "_milestones", [])
        for part, begin, end in zip(scheduler._schedulers, [0, *milestones], [*milestones, math.inf], strict=True):
            for left, cycle in _ends(part) if now < end else ():
                after = max(begin - now, 0) + left
                if now + after < end - 1:
                    yield after, cycle
    else:
        for part in getattr(scheduler, "_schedulers", []):
            yield from _ends(part)


def _required(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments that a call cannot leave out."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    given = inspect.signature(function).parameters.values()
    return [one.name for one in given if one.default is one.empty and one.kind not in variable]
