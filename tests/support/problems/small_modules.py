"""Small modules, the problem of fitting them, dense derivatives of functions written by hand, and custom autograd
Functions, of which most lose curvature."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bilevel import Params, Problem, functional_call, linearize, proximal
from bilevel.products import ForwardOverReverse, HVPProvider, ReverseOverReverse
from tests.support.cases import joined, vector

EXACT: list[HVPProvider] = [ReverseOverReverse(), ReverseOverReverse(keep_graph=True), ForwardOverReverse()]


class Fit(Problem):
    """A module's outputs, squashed and averaged; both levels call the same module."""

    regularization_weight = 0.5

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return torch.tanh(functional_call(self.module, lower, batch)).square().mean() * 3.0

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return functional_call(self.module, lower, (batch,)).sin().mean()

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return proximal(upper, lower)


class StopsGradients(Fit):
    """Of a module that detaches a part of what it computes, and means it."""

    check_curvature = False


def double(module: nn.Module, seed: int = 0) -> nn.Module:
    """In float64, with random parameters of size one."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def parameters(module: nn.Module) -> Params:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def split(flat: Tensor, like: Params) -> Params:
    parts = flat.split([leaf.numel() for leaf in like.values()])
    return {name: part.reshape(leaf.shape) for (name, leaf), part in zip(like.items(), parts, strict=True)}


def dense_hessian(function: Callable[[Params], Tensor], at: Params) -> Tensor:
    hessian = torch.autograd.functional.hessian(lambda flat: function(split(flat, at)), joined(at))
    assert isinstance(hessian, Tensor)
    return hessian


def check_products(problem: Fit, loss: Callable[[Params], Tensor], batch: Tensor, hvp: HVPProvider) -> None:
    """The system's products against the dense Hessian of an independent function."""
    lower = parameters(problem.module)
    reference = dense_hessian(loss, lower) / 2.5
    system = linearize(problem, lower, lower, [batch], hvp=hvp, damping=2.0)
    tolerance = 1e-11 if hvp.exact else 1e-6
    for seed in range(2):
        w = vector(joined(lower).numel(), seed)
        torch.testing.assert_close(
            joined(system.operator(split(w, lower))), reference @ w + w, rtol=0.0, atol=tolerance * float(w.norm())
        )


def convolutional() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)),
    )


def convolutional_by_hand(p: Params, x: Tensor, *, training: bool, buffers: dict[str, Tensor]) -> Tensor:
    def norm(h: Tensor, k: int) -> Tensor:
        if training:
            return F.batch_norm(h, None, None, p[f"{k}.weight"], p[f"{k}.bias"], training=True)
        return F.batch_norm(
            h, buffers[f"{k}.running_mean"], buffers[f"{k}.running_var"], p[f"{k}.weight"], p[f"{k}.bias"]
        )

    h = norm(F.conv2d(x, p["0.weight"]), 1).tanh().mean(dim=(2, 3))
    h = norm(F.linear(h, p["5.weight"], p["5.bias"]), 6).tanh()
    return F.linear(h, p["8.weight"], p["8.bias"])


IMAGES = vector(6 * 2 * 25, 50).reshape(6, 2, 5, 5)


def with_history(module: nn.Module) -> nn.Module:
    """The module after one plain training pass, so that its running statistics are not the initial ones."""
    module.train()
    module(IMAGES + 0.5)
    return module


def everything(module: nn.Module) -> tuple[dict[str, Tensor], list[Any]]:
    state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    return state, [(type(m), m.training, getattr(m, "track_running_stats", None)) for m in module.modules()]


def check_untouched(module: nn.Module, before: tuple[dict[str, Tensor], list[Any]]) -> None:
    after = everything(module)
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1] == after[1]
    assert all(parameter.grad is None for parameter in module.parameters())


BATCH = vector(15, 51).reshape(5, 3)


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

    def lower_output_loss(self, upper: Params, outputs: Tensor, batch: Any) -> Tensor:
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
