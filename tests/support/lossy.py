"""Operations that lose curvature, each with a first derivative that is right, and one that keeps it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bilevel import Params, Problem, functional_call


class OnceDifferentiable(torch.autograd.Function):
    """x^3."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.pow(3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 3.0 * ctx.saved_tensors[0].square() * grads[0]


class KeepsAnIntermediate(torch.autograd.Function):
    """x^3, with x^2 on ctx, where it has no history."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.square = x.square()
        return x * ctx.square

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 3.0 * ctx.square * grads[0]


class ByNumpy(torch.autograd.Function):
    """x^3, with a backward pass that leaves torch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.pow(3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        slope = 3.0 * ctx.saved_tensors[0].detach().numpy() ** 2
        return torch.from_numpy(slope * grads[0].detach().numpy())


class DetachesInBackward(torch.autograd.Function):
    """x^3."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.pow(3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 3.0 * ctx.saved_tensors[0].detach().square() * grads[0]


class Right(torch.autograd.Function):
    """x^3, differentiable twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.pow(3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 3.0 * ctx.saved_tensors[0].square() * grads[0]


FAULTY = (OnceDifferentiable, KeepsAnIntermediate, ByNumpy, DetachesInBackward)


class Activation(nn.Module):
    """A Function as a layer."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


def network(kind: str, activation: nn.Module, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A network of some layers around an activation, and its input of 12 samples, the same for every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nets = {
            "dense": (nn.Sequential(nn.Linear(5, 6), activation, nn.Linear(6, 3)), (5,)),
            "convolution": (
                nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), activation, nn.MaxPool2d(2), nn.Flatten(),
                              nn.Linear(16, 3)),
                (2, 6, 6),
            ),
            "norm": (nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), activation, nn.Dropout(0.3), nn.Linear(6, 3)),
                     (5,)),
            "attention": (_Attention(activation), (4, 8)),
        }  # fmt: skip
        module, shape = nets[kind]
        return module.to(dtype), torch.randn(12, *shape, dtype=dtype)


class _Attention(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.attention, self.out, self.activation = (
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.Linear(8, 3),
            activation,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.activation(self.attention(x, x, x, need_weights=False)[0]).mean(1))


class Weighted(Problem):
    """Sample weights on a network's losses with weight decay; `weights` makes them of the upper variable and losses."""

    def __init__(self, module: nn.Module, weights: Any = None) -> None:
        self.module = module
        self.weights = weights or (lambda x, losses: x.sigmoid())
        self.passes = 0

    def lower_outputs(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return functional_call(self.module, lower, (batch["inputs"],))

    def lower_output_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch["labels"])

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        self.passes += 1
        outputs = self.lower_outputs(upper, lower, batch)
        losses = nn.functional.cross_entropy(outputs, batch["labels"], reduction="none")
        decay = 0.5 * torch.stack([leaf.square().sum() for leaf in lower.values()]).sum()
        return (self.weights(upper["x"][batch["rows"]], losses) * losses).mean() + 0.1 * decay

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        loss = nn.functional.cross_entropy(self.lower_outputs(upper, lower, batch), batch["labels"])
        return loss + 0.1 * upper["x"].square().sum()


def setting(module: nn.Module, inputs: Tensor) -> tuple[Params, Params, dict[str, Any]]:
    """Upper and lower variables, and a batch."""
    lower = {name: p.detach().clone() for name, p in module.named_parameters()}
    rows = torch.arange(len(inputs))
    upper = {"x": torch.linspace(-1.0, 1.0, len(inputs), dtype=inputs.dtype)}
    return upper, lower, {"inputs": inputs, "labels": rows % 3, "rows": rows}
