"""The optimizers of torch.optim as updates, and live ones read as such."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, final

import torch
from torch import Tensor

from bilevel import tree
from bilevel.hypergradients.updates.update import COUNT, AdamUpdate, SGDUpdate, State, Update
from bilevel.tree import Params

# What the constructors of torch.optim take and an update has no use for: how to run, not what to compute.
_EXECUTION = frozenset({"params", "differentiable", "foreach", "fused", "capturable"})


@final
@dataclass(frozen=True)
class TorchUpdate(Update):
    """Any optimizer of torch.optim that has the flag ``differentiable=True``, run on copies.

    Its options are constants. For Adam prefer `AdamUpdate`: torch's differentiable steps have a NaN derivative where a
    second moment is zero, and correct Adam's bias in single precision whatever the dtype of the variables.

    Args:
        optimizer: the class, for example ``torch.optim.RMSprop``.
        options: its keyword arguments, without the parameters and without ``differentiable``.

    Raises:
        TypeError: not an optimizer class; one without the flag (LBFGS, SparseAdam, Adafactor, Muon); a tensor among
            the options.
        ValueError: options that the optimizer refuses, or SGD with momentum, whose first step torch detaches.
    """

    optimizer: type[torch.optim.Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (isinstance(self.optimizer, type) and issubclass(self.optimizer, torch.optim.Optimizer)):
            raise TypeError(f"TorchUpdate: optimizer must be a class of torch.optim, got {self.optimizer!r}")
        name = self.optimizer.__name__
        if "differentiable" not in inspect.signature(self.optimizer).parameters:
            raise TypeError(
                f"TorchUpdate: {name} cannot be differentiated through (it has no argument `differentiable`); use "
                "SGDUpdate, AdamUpdate or an optimizer that has it, such as torch.optim.RMSprop"
            )
        if "differentiable" in self.options:
            raise ValueError("TorchUpdate: leave `differentiable` out of the options; it is always set")
        tensors = [key for key, value in self.options.items() if any(True for _ in tree.tensors_in(value))]
        if tensors:
            raise TypeError(
                f"TorchUpdate: the options {tensors} are tensors; {name} may drop their gradient, so give numbers, or "
                "use SGDUpdate or AdamUpdate, which differentiate with respect to their options"
            )
        if issubclass(self.optimizer, torch.optim.SGD) and self.options.get("momentum"):
            raise ValueError(
                "TorchUpdate: torch.optim.SGD detaches the gradient of the first step from its momentum, which makes "
                "derivatives wrong; use SGDUpdate, whose steps are the same"
            )
        self._build([torch.zeros(1)])

    def init(self, params: Params) -> State:
        return {}

    def step(self, params: Params, gradients: Params, state: State) -> tuple[Params, State]:
        copies = {name: y.clone() for name, y in params.items()}
        optimizer = self._build(list(copies.values()))
        for name, y in copies.items():
            y.grad = gradients[name]
            saved = {slot: values[name].clone() for slot, values in state.items() if name in values}
            if saved:
                optimizer.state[y] = saved
        optimizer.step()
        after: State = {}
        for name, y in copies.items():
            for slot, value in optimizer.state[y].items():
                after.setdefault(slot, {})[name] = value
            y.grad = None
        return copies, after

    def _build(self, params: list[Tensor]) -> torch.optim.Optimizer:
        return self.optimizer(params, **self.options, differentiable=True)  # pyright: ignore[reportCallIssue]


def from_optimizer(optimizer: torch.optim.Optimizer, params: Params) -> tuple[Update, State]:
    """The update that a live optimizer is about to make, and its state, copied, for `params` by name.

    torch.optim.SGD and Adam (AdamW) become `SGDUpdate` and `AdamUpdate`, any other one a `TorchUpdate`. Flags of
    execution (foreach, fused, capturable) change nothing.

    Args:
        optimizer: with one parameter group.
        params: variables that the optimizer holds.

    Raises:
        ValueError: more than one group; a variable that the optimizer does not hold; `maximize`; SGD with dampening;
            Adam with amsgrad or with variables of different ages; a subclass of SGD or Adam with a step of its own.
        TypeError: as for `TorchUpdate`.
    """
    if len(optimizer.param_groups) != 1:
        raise ValueError(
            f"optimizer has {len(optimizer.param_groups)} parameter groups; an Update has one set of options, so build "
            "the optimizer with a single group"
        )
    group = optimizer.param_groups[0]
    held = {id(variable) for variable in group["params"]}
    missing = [name for name, leaf in params.items() if id(leaf) not in held]
    if missing:
        raise ValueError(f"params: the optimizer does not hold {missing[:3]}; pass the tensors it was built from")
    for key in ("maximize", "dampening", "amsgrad"):
        if group.get(key):
            raise ValueError(f"optimizer: {key}={group[key]!r} has no counterpart in an Update; build one without it")
    for known in (torch.optim.SGD, torch.optim.Adam):
        if isinstance(optimizer, known) and inspect.unwrap(type(optimizer).step) is not inspect.unwrap(known.step):
            raise ValueError(
                f"optimizer: {type(optimizer).__name__} has a step of its own, which no Update is known for; take "
                f"torch.optim.{known.__name__}, or write the step as an Update"
            )
    saved: State = {}
    for name, leaf in params.items():
        for slot, value in optimizer.state.get(leaf, {}).items():
            if isinstance(value, Tensor):
                saved.setdefault(slot, {})[name] = value.detach().clone()
    if isinstance(optimizer, torch.optim.SGD):
        update = SGDUpdate(float(group["lr"]), group["momentum"], group["weight_decay"], group["nesterov"])
        state = update.init(params)
        return update, {slot: values | saved.get("momentum_buffer", {}) for slot, values in state.items()}
    if isinstance(optimizer, torch.optim.Adam):
        return _from_adam(group, saved, params)
    accepted = set(inspect.signature(type(optimizer)).parameters) - _EXECUTION
    options = {key: float(v) if isinstance(v, Tensor) else v for key, v in group.items() if key in accepted}
    return TorchUpdate(type(optimizer), options), saved


def saved_update(update: Update) -> dict[str, Any]:
    """The options of an update that `from_optimizer` made, as plain values for a checkpoint."""
    if isinstance(update, TorchUpdate):
        return dict(update.options)
    assert isinstance(update, SGDUpdate | AdamUpdate)
    return {option.name: getattr(update, option.name) for option in fields(update)}


def restored_update(options: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Update:
    """Inverse of `saved_update`, for the same kind of optimizer."""
    if isinstance(optimizer, torch.optim.SGD):
        return SGDUpdate(**options)
    if isinstance(optimizer, torch.optim.Adam):
        return AdamUpdate(**options)
    return TorchUpdate(type(optimizer), options)


def _from_adam(group: Mapping[str, Any], saved: State, params: Params) -> tuple[Update, State]:
    betas = (float(group["betas"][0]), float(group["betas"][1]))
    update = AdamUpdate(
        float(group["lr"]), betas, group["eps"], group["weight_decay"], bool(group["decoupled_weight_decay"])
    )
    if not saved:
        return update, update.init(params)
    steps = {int(saved["step"][name]) if name in saved["step"] else 0 for name in params}
    if len(steps) != 1:
        raise ValueError(f"optimizer: its variables have made different numbers of steps, {sorted(steps)}")
    count = {COUNT: torch.tensor(steps.pop(), dtype=torch.int64)}
    return update, {"step": count, "mean": saved["exp_avg"], "square": saved["exp_avg_sq"]}
