"""The problems on which packages are compared, in a form that every package's interface can be fed from.

The lower objective is G(x, y) = mean over batches of loss(module(X), t) + penalty(x, y), with y the module's
parameters. Every hypergradient is asked at a given y. Where F(x, y) = <v, y> and the penalty is c/2 ||y - x||^2, the
hypergradient is (I + H/c)^-1 v itself, so that the same call solves a linear system.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.func import functional_call

Variables = tuple[Tensor, ...]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A hypergradient to compute: x, y = the module's parameters in their order, and the objectives' parts."""

    upper: Variables
    module: nn.Module
    loss: nn.Module
    batches: tuple[Pair, ...]
    penalty: Callable[[Variables, Variables], Tensor]
    upper_loss: Callable[[Variables, Variables], Tensor]

    @property
    def lower(self) -> Variables:
        return tuple(parameter.detach() for parameter in self.module.parameters())

    def data_loss(self, y: Sequence[Tensor], batch: Pair) -> Tensor:
        """The loss of one batch at y, as a user of torch.func writes it: BatchNorm updates its statistics."""
        inputs, target = batch
        names = [name for name, _ in self.module.named_parameters()]
        return self.loss(functional_call(self.module, dict(zip(names, y, strict=True)), (inputs,)), target)

    def lower_loss(self, x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
        losses = [self.data_loss(y, batch) for batch in self.batches]
        return torch.stack(losses).mean() + self.penalty(tuple(x), tuple(y))

    def copied(self, *, statistics: bool = True) -> "Case":
        """With a module of its own; without `statistics`, BatchNorm has no running statistics to update."""
        module = copy.deepcopy(self.module)
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d) and not statistics:
                layer.running_mean = layer.running_var = layer.num_batches_tracked = None
                layer.track_running_stats = False
        return replace(self, module=module)

    def to(self, place: torch.device | torch.dtype) -> "Case":
        """The same in another precision or on another device; `upper_loss` and `penalty` must work there too."""
        batches = tuple((X.to(place), t.to(place) if t.is_floating_point() else t) for X, t in self.batches)
        if isinstance(place, torch.device):
            batches = tuple((X, t.to(place)) for X, t in batches)
        upper = tuple(x.to(place) for x in self.upper)
        return replace(self, upper=upper, module=copy.deepcopy(self.module).to(place), batches=batches)


class HalfSquaredError(nn.Module):
    """1/(2n) ||z - t||^2 over n rows; `reduction` says that it is a mean."""

    reduction = "mean"

    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        return 0.5 * (outputs.squeeze(-1) - target).square().mean()


class Weighted(nn.Module):
    """1/2 sum_i t_i z_i^2: on unit inputs a quadratic with the eigenvalues t."""

    reduction = "mean"

    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        return 0.5 * (target * outputs.squeeze(-1).square()).sum()


class NTXent(nn.Module):
    """Normalised temperature-scaled cross-entropy; row i of the outputs has its other view in row target[i]."""

    reduction = "mean"

    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        z = nn.functional.normalize(outputs)
        diagonal = torch.eye(len(z), dtype=torch.bool, device=z.device)
        return nn.functional.cross_entropy((z @ z.T / 0.5).masked_fill(diagonal, -1e9), target)


def linear(weights: Tensor) -> nn.Module:
    """A linear layer with one output, no bias and these weights."""
    module = nn.Linear(len(weights), 1, bias=False, dtype=weights.dtype)
    with torch.no_grad():
        module.weight.copy_(weights[None])
    return module


def ridge(points: int = 200, features: int = 40) -> tuple[Case, Tensor]:
    """Ridge regression with one log-weight a feature at its exact lower solution, and the hypergradient on paper.

    dF/dx_j = -exp(x_j) y_j [H^-1 v]_j with H = X'X/n + diag(exp x).
    """
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(2 * points, features, generator=generator, dtype=torch.float64)
    X = X * torch.logspace(-0.5, 0.5, features, dtype=torch.float64)
    t = X @ torch.randn(features, generator=generator, dtype=torch.float64)
    t = t + torch.randn(2 * points, generator=generator, dtype=torch.float64)
    log_weight = torch.linspace(-4.0, 0.0, features, dtype=torch.float64)
    train, validation = (X[:points], t[:points]), (X[points:], t[points:])
    H = train[0].T @ train[0] / points + torch.diag(log_weight.exp())
    w = torch.linalg.solve(H, train[0].T @ train[1] / points)
    v = validation[0].T @ (validation[0] @ w - validation[1]) / points
    case = Case(
        upper=(log_weight,),
        module=linear(w),
        loss=HalfSquaredError(),
        batches=(train,),
        penalty=lambda x, y: 0.5 * (x[0].exp() * y[0].squeeze(0).square()).sum(),
        upper_loss=lambda x, y: 0.5 * (validation[0] @ y[0].squeeze(0) - validation[1]).square().mean(),
    )
    return case, -log_weight.exp() * w * torch.linalg.solve(H, v)


def proximal_case(module: nn.Module, loss: nn.Module, batches: tuple[Pair, ...], v: Variables, c: float) -> Case:
    """The case whose hypergradient solves [I + H/c] x = v."""

    def penalty(x: Variables, y: Variables) -> Tensor:
        return 0.5 * c * torch.stack([(b - a).square().sum() for a, b in zip(x, y, strict=True)]).sum()

    def upper_loss(x: Variables, y: Variables) -> Tensor:
        return torch.stack([(a.to(b) * b).sum() for a, b in zip(v, y, strict=True)]).sum()

    upper = tuple(parameter.detach().clone() for parameter in module.parameters())
    return Case(upper, module, loss, batches, penalty, upper_loss)


def quadratic(eigenvalues: Tensor) -> tuple[Case, Tensor]:
    """A = diag(1 + eigenvalues) and the right-hand side of ones; the solution."""
    n = len(eigenvalues)
    batch = (torch.eye(n, dtype=eigenvalues.dtype), eigenvalues)
    right = torch.ones(1, n, dtype=eigenvalues.dtype)
    module = linear(torch.zeros(n, dtype=eigenvalues.dtype))
    return proximal_case(module, Weighted(), (batch,), (right,), 1.0), right / (1.0 + eigenvalues)


def network(width: int) -> nn.Module:
    """Four convolutions with BatchNorm and ReLU and a projection; 278,304 parameters at width 32."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, width), (width, 2 * width), (2 * width, 4 * width), (4 * width, 4 * width)):
        stride = 1 if inputs == outputs else 2
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 6 * width), nn.ReLU()]
    layers += [nn.Linear(6 * width, 2 * width)]
    for layer in layers:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            # With torch's smaller default the loss is so sharp in scale-invariant weights that I + H/c is indefinite.
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return nn.Sequential(*layers)


def contrastive_batches(count: int, size: int, generator: torch.Generator) -> tuple[Pair, ...]:
    """Two views of crops of 32 x 32 from scikit-learn's two photographs, shifted and with another brightness."""
    photographs = [torch.from_numpy(image.copy()).permute(2, 0, 1) / 255.0 for image in load_sample_images().images]
    partner = torch.arange(2 * size).roll(size)

    def integer(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    def crops() -> tuple[Tensor, Tensor]:
        image = photographs[integer(len(photographs))]
        top, left = integer(image.shape[1] - 40), integer(image.shape[2] - 40)
        places = [(top + integer(9), left + integer(9)) for _ in range(2)]
        first, second = (image[:, i : i + 32, j : j + 32] - 0.5 for i, j in places)
        light = 0.8 + 0.4 * torch.rand(2, generator=generator)
        return first * light[0], second * light[1]

    batches = []
    for _ in range(count):
        views = [crops() for _ in range(size)]
        batches.append((torch.stack([view[0] for view in views] + [view[1] for view in views]), partner))
    return tuple(batches)


def bissl_shaped(*, width: int, batches: int, size: int, steps: int, c: float = 10.001) -> Case:
    """[I + H/c] x = v of a contrastive network after `steps` training steps; v is a gradient on another batch."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    module, loss = network(width), NTXent()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    for X, t in contrastive_batches(steps, size, generator):
        optimizer.zero_grad()
        loss(module(X), t).backward()
        optimizer.step()
    optimizer.zero_grad()
    # Labels that follow the image's content: which of ten equal parts the mean brightness of the crop lies in.
    ((X, _),) = contrastive_batches(1, size, generator)
    label = X.mean((1, 2, 3)).argsort().argsort() * 10 // len(X)
    head = torch.randn(2 * width, 10) / width**0.5
    v = torch.autograd.grad(nn.functional.cross_entropy(module(X) @ head, label), list(module.parameters()))
    return proximal_case(module, loss, contrastive_batches(batches, size, generator), v, c)
