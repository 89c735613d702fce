"""The pretext optimizer (LARS), steps of a given size whatever the gradient's, and the learning-rate schedules."""

# torch has no public name for its foreach operations.
# pyright: reportPrivateImportUsage=false

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import ParamsT


class LARS(Optimizer):
    """SGD with momentum whose step is scaled, tensor by tensor, to the size of the parameter.

    For a parameter p with gradient g and more than one dimension::

        d = g + weight_decay * p
        d = d * trust_coefficient * ||p|| / ||d||        (factor 1 where either norm is 0)
        m = momentum * m + d
        p = p - lr * m

    With `exclude_1d`, parameters of at most one dimension (biases, normalisation scales) get neither decay nor scaling:
    ``d = g``. The decay belongs to the optimizer, not to the objective. The step is made of operations on all tensors
    at once and runs without waiting for the device; it takes the memory of one more copy of the gradient.

    Args:
        params: Parameters or parameter groups; a group may set any of the options below.
        lr: Learning rate, the actual one (no scaling by batch size), at least 0.
        momentum: In [0, 1).
        weight_decay: At least 0.
        trust_coefficient: The eta of the source, above 0.
        exclude_1d: False scales and decays every parameter.

    Raises:
        ValueError: An option is outside its range; the message names it.

    Source: You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks" (2017), with the scaled gradient
    (not the scaled learning rate) in the momentum, as VICReg (Bardes, Ponce and LeCun, 2022) was trained.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        exclude_1d: bool = True,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "exclude_1d": exclude_1d,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters with their own options, which are checked as the constructor's are."""
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the gradients in ``.grad``; returns what `closure` returned, if one is given.

        Raises:
            RuntimeError: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for params, scaled in _alike(group["params"], group["exclude_1d"]):
                self._move(params, scaled, group)
        return loss

    def _move(self, params: list[Tensor], scaled: bool, group: dict[str, Any]) -> None:
        """The step of parameters of one device and dtype: a few operations on all of them."""
        gradients, momenta = [p.grad for p in params if p.grad is not None], [self._momentum(p) for p in params]
        torch._foreach_mul_(momenta, group["momentum"])
        directions = _scaled(params, gradients, group) if scaled else gradients
        torch._foreach_add_(momenta, directions)
        torch._foreach_add_(params, momenta, alpha=-group["lr"])

    def _momentum(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]


class NormalizedSGD(Optimizer):
    """Gradient descent whose step of every tensor has the root mean square `lr`: ``p = p - lr * g / rms(g)``.

    A tensor whose gradient is 0 stays.

    Args:
        params: Parameters or parameter groups.
        lr: Root mean square of a step, above 0.
    """

    def __init__(self, params: ParamsT, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients in ``.grad``."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    size = p.grad.square().mean().sqrt()
                    p.sub_(torch.where(size > 0, group["lr"] / size, 0.0) * p.grad)


def _alike(params: Iterable[Tensor], exclude_1d: bool) -> list[tuple[list[Tensor], bool]]:
    """Parameters with a gradient, by device, dtype and whether they are decayed and scaled, which comes with each."""
    found: dict[tuple[Any, ...], list[Tensor]] = {}
    for p in params:
        if p.grad is None:
            continue
        if p.grad.is_sparse:
            raise RuntimeError("LARS takes no sparse gradients; build the embedding with sparse=False")
        found.setdefault((p.ndim > 1 or not exclude_1d, p.device, p.dtype, p.grad.dtype), []).append(p)
    return [(some, scaled) for (scaled, *_), some in found.items()]


def _scaled(params: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """The decayed, scaled gradients that enter the momentum."""
    d = torch._foreach_add(gradients, params, alpha=group["weight_decay"])
    p_norms, d_norms = torch.stack(torch._foreach_norm(params)), torch.stack(torch._foreach_norm(d))
    # torch.where instead of a Python condition, which would wait for the device twice per tensor.
    factors = torch.where((p_norms > 0) & (d_norms > 0), group["trust_coefficient"] * p_norms / d_norms, 1.0)
    return list(torch._foreach_mul(d, factors.unbind()))


def _check_options(options: dict[str, Any]) -> None:
    if not options["lr"] >= 0:
        raise ValueError(f"lr must be at least 0, got {options['lr']!r}")
    if not 0 <= options["momentum"] < 1:
        raise ValueError(f"momentum must be in [0, 1), got {options['momentum']!r}")
    if not options["weight_decay"] >= 0:
        raise ValueError(f"weight_decay must be at least 0, got {options['weight_decay']!r}")
    if not options["trust_coefficient"] > 0:
        raise ValueError(f"trust_coefficient must be above 0, got {options['trust_coefficient']!r}")


def constant(step: int) -> float:
    """The multiplier 1 at every step."""
    return 1.0


def warmup_cosine(step: int, *, total_steps: int, warmup_steps: int = 0, floor: float = 0.0) -> float:
    """Multiplier of the base learning rate for update `step` (counted from 0): a linear rise, then half a cosine.

    With W = warmup_steps and T = total_steps::

        step <  W:       (step + 1) / (W + 1)
        W <= step <= T:  floor + (1 - floor) (1 + cos(pi (step - W) / (T - W))) / 2
        step >  T:       floor

    The first update therefore has ``1 / (W + 1)`` of the base, neither nothing nor all of it; the base itself is
    reached at ``step == W``, and `floor` at ``step == T``, one step after the last update.

    Args:
        step: Number of updates made so far.
        total_steps: Updates in the whole schedule, warm-up included.
        warmup_steps: Updates of the linear part, fewer than `total_steps`.
        floor: Last multiplier, in [0, 1], as a fraction of the base learning rate.

    Raises:
        ValueError: An argument is outside its range.
    """
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"warmup_steps must be in [0, total_steps), got {warmup_steps} of {total_steps} steps")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must be in [0, 1], got {floor!r}")
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    done = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def schedule(
    optimizer: Optimizer,
    shape: Literal["cosine", "constant"] = "cosine",
    *,
    total_steps: int,
    warmup_steps: int = 0,
    floor: float = 0.0,
) -> LambdaLR:
    """Ties the learning rates of `optimizer` to a schedule; call ``.step()`` once after every update.

    Building it sets the rates for the first update, and each ``.step()`` those for the next one. Every parameter group
    keeps its own base rate. ``.get_last_lr()`` gives the rates in force; ``.state_dict()`` holds numbers only and,
    loaded together with the optimizer's, continues the schedule exactly.

    Args:
        optimizer: Its present learning rates become the base rates.
        shape: "cosine" is `warmup_cosine`; "constant" keeps the base rates and ignores the other arguments.
        total_steps: As in `warmup_cosine`.
        warmup_steps: As in `warmup_cosine`.
        floor: As in `warmup_cosine`.

    Raises:
        ValueError: An unknown shape, or what `warmup_cosine` refuses.
    """
    if shape == "constant":
        return LambdaLR(optimizer, constant)
    if shape != "cosine":
        raise ValueError(f'shape must be "cosine" or "constant", got {shape!r}')
    return LambdaLR(optimizer, partial(warmup_cosine, total_steps=total_steps, warmup_steps=warmup_steps, floor=floor))
