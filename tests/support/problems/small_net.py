"""A problem with all that a resumption could lose, and a trainer for it."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bilevel import (
    CG,
    AlternatingSchedule,
    BatchStack,
    Checkpointing,
    Implicit,
    Level,
    Method,
    Params,
    Problem,
    Trainer,
    functional_call,
    proximal,
)
from bilevel.training import BatchSource, Blocks, Callback, JSONLWriter
from tests.support.cases import vector
from tests.support.problems.two_heads import inverse


class Net(Problem):
    """Dropout, BatchNorm and a momentum target: all that a resumption could lose."""

    regularization_weight = 0.5
    curvature_depends_on_upper = False

    def __init__(self, device: torch.device | str = "cpu") -> None:
        torch.manual_seed(5)
        net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 2))
        self.net = net.to(device)
        self.target = {name: p.detach().clone() for name, p in self.net.named_parameters()}

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        with torch.no_grad():
            goal = functional_call(self.net, self.target, batch)
        return (functional_call(self.net, lower, batch) - goal - batch[:, :2]).square().mean()

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return (
            functional_call(self.net, lower, batch).square().mean()
            + 0.1 * functional_call(self.net, upper, batch).mean()
        )

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return proximal(upper, lower)

    def after_lower_step(self, upper: Params, lower: Params, step: int) -> None:
        for name, leaf in self.target.items():
            leaf.lerp_(lower[name].detach(), 0.1)

    def state_dict(self) -> dict[str, Any]:
        buffers = {name: buffer.clone() for name, buffer in self.net.named_buffers()}
        return {"target": {name: leaf.clone() for name, leaf in self.target.items()}, "buffers": buffers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, leaf in self.target.items():
            leaf.copy_(state["target"][name])
        for name, buffer in self.net.named_buffers():
            buffer.copy_(state["buffers"][name])


class Bell(Callback):
    """Sends this process a signal in the evaluation of the lower objective with a given number."""

    def __init__(self, problem: Net, number: int) -> None:
        self.left, real = number, problem.lower_objective

        def counted(upper: Params, lower: Params, batch: Tensor) -> Tensor:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(upper, lower, batch)

        problem.lower_objective = counted  # type: ignore[method-assign]


DATA = vector(80, 60).reshape(20, 4).float()


def net_trainer(
    folder: Path,
    *extra: Callback,
    method: Method | None = None,
    lower_steps: int = 3,
    upper_steps: int = 3,
    adapts: bool = True,
    blocks: bool = False,
    upper_data: Any = None,
    lower_data: Any = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Trainer:
    """By three iterations of CG on two batches where no method is given, on stacks where no data are, or `blocks`;
    `options` are the trainer's."""
    problem = Net(device)
    upper, lower = ({name: p.detach().clone() for name, p in problem.net.named_parameters()} for _ in range(2))
    lower_optimizer = torch.optim.SGD(lower.values(), lr=0.2, momentum=0.9)
    upper_optimizer = torch.optim.Adam(upper.values(), lr=0.05)

    def load(indices: Tensor, seed: int) -> Tensor:
        noise = torch.randn(len(indices), 4, generator=torch.Generator().manual_seed(seed))
        return (DATA[indices] + 0.1 * noise).to(device)

    def source(size: int, batch_size: int, seed: int) -> BatchSource:
        if blocks:
            return Blocks(size, batch_size, lambda indices: load(indices, 3), seed=seed, sweep_size=batch_size)
        return BatchStack(size, batch_size, load, seed=seed)

    return Trainer(
        problem,
        Level(
            upper,
            upper_optimizer,
            source(10, 4, 2) if upper_data is None else upper_data,
            scheduler=torch.optim.lr_scheduler.LambdaLR(upper_optimizer, inverse),
            max_grad_norm=1.0,
        ),
        Level(
            lower,
            lower_optimizer,
            source(20, 6, 1) if lower_data is None else lower_data,
            scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(lower_optimizer, 12),
            max_grad_norm=1.0,
        ),
        AlternatingSchedule(4, lower_steps, upper_steps, 2, 0.3, {name: name for name in upper})
        if adapts
        else AlternatingSchedule(4, lower_steps, upper_steps),
        Implicit(CG(3, rtol=None), damping=2.0, hessian_batches=2) if method is None else method,
        callbacks=[JSONLWriter(folder / "metrics.jsonl", {"seed": 1}), Checkpointing(folder / "checkpoints"), *extra],
        **{"on_failure": "ignore", **options},
    )
