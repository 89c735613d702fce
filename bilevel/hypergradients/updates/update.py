"""Optimizer steps as pure functions, differentiable any number of times."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel import tree
from bilevel.checks import check_kind, check_number
from bilevel.tree import Params

State = dict[str, Params]
"""Slot -> variable -> tensor. Gradients pass through floating-point tensors, except those of the slot "step"."""

COUNT = "count"
"""Key of Adam's number of steps in its slot "step"."""


class Update(ABC):
    """One step of an optimizer, ``(y, g, state) -> (y', state')``, written without side effects.

    Subclasses are final and frozen: an update holds options and no state. `Unrolled` differentiates it
    with respect to all three arguments, and to those of its options that are tensors.
    """

    @abstractmethod
    def init(self, params: Params) -> State:
        """The state before the first step."""

    @abstractmethod
    def step(self, params: Params, gradients: Params, state: State) -> tuple[Params, State]:
        """The variables and the state after one step.

        Args:
            params, gradients: y and g, with the same names.
            state: from `init` or from the step before; it is not written to.
        """


@final
@dataclass(frozen=True)
class SGDUpdate(Update):
    r"""Gradient descent, with the conventions of torch.optim.SGD:

    .. math:: g \leftarrow g + w y, \quad m' = \mu m + g, \quad y' = y - \alpha d,

    where d is g without momentum, m' with it, and :math:`g + \mu m'` in Nesterov's form.

    Args:
        lr: alpha >= 0; a number or a 0-d tensor, through which gradients pass.
        momentum: mu >= 0.
        weight_decay: w >= 0.
        nesterov: needs momentum.

    Raises:
        TypeError: a `nesterov` that is no truth value.
        ValueError: an option outside its range, a tensor that is not 0-d, or `nesterov` without momentum.
    """

    lr: float | Tensor
    momentum: float | Tensor = 0.0
    weight_decay: float | Tensor = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        _check_option("SGDUpdate", "lr", self.lr)
        _check_option("SGDUpdate", "momentum", self.momentum)
        _check_option("SGDUpdate", "weight_decay", self.weight_decay)
        check_kind("SGDUpdate: nesterov", self.nesterov, bool, "True or False")
        if self.nesterov and not self._has_momentum:
            raise ValueError(f"SGDUpdate: nesterov=True needs a momentum above 0, got momentum={self.momentum!r}")

    @property
    def _has_momentum(self) -> bool:
        return isinstance(self.momentum, Tensor) or self.momentum > 0.0

    def init(self, params: Params) -> State:
        return {"momentum": tree.zeros_like(params)} if self._has_momentum else {}

    def step(self, params: Params, gradients: Params, state: State) -> tuple[Params, State]:
        moved, velocity = {}, {}
        for name, y in params.items():
            d = _decayed(y, gradients[name], self.weight_decay)
            if self._has_momentum:
                mu = _like(self.momentum, y)
                velocity[name] = mu * state["momentum"][name] + d
                d = d + mu * velocity[name] if self.nesterov else velocity[name]
            moved[name] = y - _like(self.lr, y) * d
        return moved, {"momentum": velocity} if self._has_momentum else {}


@final
@dataclass(frozen=True)
class AdamUpdate(Update):
    r"""Adam (Kingma & Ba 2015) and AdamW (Loshchilov & Hutter 2019), with the conventions of torch.optim:

    .. math:: m' = \beta_1 m + (1 - \beta_1) g, \quad s' = \beta_2 s + (1 - \beta_2) g^2, \quad
       y' = y - \alpha \frac{m' / (1 - \beta_1^t)}{\sqrt{s' / (1 - \beta_2^t)} + \epsilon}.

    Where s' = 0 (an entry whose gradients have all been zero) the step has the derivative
    :math:`-\alpha (1 - \beta_1) / ((1 - \beta_1^t) \epsilon)` with respect to g, and so it does here; plain automatic
    differentiation gives NaN, the infinite slope of the root times m' = 0.

    Args:
        lr: alpha >= 0; a number or a 0-d tensor, through which gradients pass.
        betas: beta_1 and beta_2, in [0, 1).
        eps: epsilon > 0, outside the square root.
        weight_decay: w >= 0, added to the gradient as ``w y``, or, if `decoupled`, applied as ``y (1 - alpha w)``.

    Raises:
        TypeError: betas that are no pair, a `decoupled` that is no truth value.
        ValueError: an option outside its range or a tensor that is not 0-d.
    """

    lr: float | Tensor
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float | Tensor = 0.0
    decoupled: bool = False

    def __post_init__(self) -> None:
        _check_option("AdamUpdate", "lr", self.lr)
        _check_option("AdamUpdate", "eps", self.eps, positive=True)
        _check_option("AdamUpdate", "weight_decay", self.weight_decay)
        check_kind("AdamUpdate: decoupled", self.decoupled, bool, "True or False")
        check_kind("AdamUpdate: betas", self.betas, (tuple, list), "two numbers, such as (0.9, 0.999)")
        if len(self.betas) != 2:
            raise ValueError(f"AdamUpdate: betas must be two numbers, such as (0.9, 0.999), got {self.betas!r}")
        for k, beta in enumerate(self.betas):
            _check_option("AdamUpdate", f"betas[{k}]", beta, below=1.0)

    def init(self, params: Params) -> State:
        return {
            "step": {COUNT: torch.zeros((), dtype=torch.int64)},
            "mean": tree.zeros_like(params),
            "square": tree.zeros_like(params),
        }

    def step(self, params: Params, gradients: Params, state: State) -> tuple[Params, State]:
        count = state["step"][COUNT] + 1
        t = int(count)
        moved, mean, square = {}, {}, {}
        for name, y in params.items():
            lr, beta1, beta2 = (_like(value, y) for value in (self.lr, *self.betas))
            g = gradients[name]
            if self.decoupled:
                y = y * (1.0 - lr * _like(self.weight_decay, y))
            else:
                g = _decayed(y, g, self.weight_decay)
            mean[name] = beta1 * state["mean"][name] + (1.0 - beta1) * g
            square[name] = beta2 * state["square"][name] + (1.0 - beta2) * g.square()
            scale = _root(square[name]) / (1.0 - beta2**t) ** 0.5 + self.eps
            moved[name] = y - lr / (1.0 - beta1**t) * (mean[name] / scale)
        return moved, {"step": {COUNT: count}, "mean": mean, "square": square}


def starting_state(update: Update, params: Params, state: State | None) -> State:
    """`state`, detached, if it covers what the update keeps for `params`; a fresh one for None.

    Raises:
        ValueError: a state that lacks a slot or a variable.
    """
    fresh = update.init(tree.detach(params))
    if state is None:
        return fresh
    missing = [f"{slot}/{n}" for slot, values in fresh.items() for n in values if n not in state.get(slot, {})]
    if missing:
        raise ValueError(
            f"state lacks {missing[:3]} ({len(missing)} in all), which {type(update).__name__} keeps for these "
            "variables; pass the state of this update for them, or None to start afresh"
        )
    return {slot: tree.detach(values) for slot, values in state.items()}


def _check_option(
    update: str, name: str, value: object, *, positive: bool = False, below: float = float("inf")
) -> None:
    """Ranges of tensors are not checked: that would wait for the device."""
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{update}: {name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
        return
    check_number(f"{update}: {name}", value, positive=positive, below=below)


def _like(value: float | Tensor, leaf: Tensor) -> float | Tensor:
    """An option in the dtype of a leaf, so that a 0-d leaf keeps its own."""
    return value.to(leaf) if isinstance(value, Tensor) else value


def _decayed(y: Tensor, g: Tensor, weight_decay: float | Tensor) -> Tensor:
    if not isinstance(weight_decay, Tensor) and weight_decay == 0.0:
        return g
    return g + _like(weight_decay, y) * y


def _root(square: Tensor) -> Tensor:
    """The square root, with derivative 0 at 0; a NaN stays one."""
    zero = square == 0.0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())


def differentiable(slot: str, tensor: Tensor) -> bool:
    """Whether a tensor of a state under this slot takes part in derivatives: counts do not."""
    return slot != "step" and tensor.is_floating_point()


def carry(lower: Params, state: State, names: Sequence[str]) -> Params:
    """What one step hands to the next, as one tree: the variables under the empty slot, and their state."""
    flat = {f"/{name}": lower[name] for name in names}
    for slot, values in state.items():
        flat |= {f"{slot}/{n}": t for n, t in values.items() if n in names and differentiable(slot, t)}
    return flat


def limited(gradient: Params, limit: float | None) -> Params:
    """The gradient scaled down to the norm `limit` where it is longer."""
    if limit is None:
        return gradient
    norm = tree.norm(gradient)
    longer = norm > limit
    return tree.scale(torch.where(longer, limit / torch.where(longer, norm, limit), 1.0), gradient)
