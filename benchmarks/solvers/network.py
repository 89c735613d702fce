"""The system I + H/c of a small contrastive network with BatchNorm, solved and multiplied in every way, against dense
algebra.

The network is trained on 8 x 8 handwritten digits, two noisy shifted views of each; H is the mean Hessian over a few
batches, and right-hand sides are gradients of a classification loss on the same backbone.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.measuring import Timing, interleaved
from bilevel import CG, MINRES, Identity, Neumann, Params, Problem, functional_call, linearize, proximal
from bilevel.compare import lower_gradient, relative
from bilevel.linear import Diagonal, Escalating, FunctionOperator, LinearOperator, Nystrom, Solver
from bilevel.products import FiniteDifference, ForwardOverReverse, GaussNewton, HVPProvider, ReverseOverReverse

WEIGHTS = (10.0, 3.0, 1.0)
RIGHT_HAND_SIDES = 8

REVERSE = ReverseOverReverse(keep_graph=True)
SOLVERS: dict[str, tuple[Solver, HVPProvider]] = {
    "Identity()": (Identity(), REVERSE),
    "CG(1, None)": (CG(1, None), REVERSE),
    "CG(2, None)": (CG(2, None), REVERSE),
    "CG(5, None)": (CG(5, None), REVERSE),
    "CG(10, None)": (CG(10, None), REVERSE),
    "CG(20, None)": (CG(20, None), REVERSE),
    "CG(100, 1e-2)": (CG(100, 1e-2), REVERSE),
    "CG(2, None, layerwise=True)": (CG(2, None, layerwise=True), REVERSE),
    "CG(5, None, layerwise=True)": (CG(5, None, layerwise=True), REVERSE),
    "CG(20, None, layerwise=True)": (CG(20, None, layerwise=True), REVERSE),
    "MINRES(5, None)": (MINRES(5, None), REVERSE),
    "MINRES(20, None)": (MINRES(20, None), REVERSE),
    "MINRES(100, 1e-2)": (MINRES(100, 1e-2), REVERSE),
    "Neumann(5)": (Neumann(5), REVERSE),
    "Neumann(20)": (Neumann(20), REVERSE),
    "Neumann(5, scale=1.0)": (Neumann(5, scale=1.0), REVERSE),
    "Nystrom(20, tikhonov=1.0, max_refinements=0)": (Nystrom(20, tikhonov=1.0, max_refinements=0, rtol=None), REVERSE),
    "Nystrom(20, tikhonov=1.0, max_refinements=5)": (Nystrom(20, tikhonov=1.0, max_refinements=5, rtol=None), REVERSE),
    "CG(5, None, preconditioner=Diagonal())": (CG(5, None, preconditioner=Diagonal()), REVERSE),
    "Escalating(CG(20, None))": (Escalating(CG(20, None)), REVERSE),
    "CG(20, None) with GaussNewton()": (CG(20, None), GaussNewton()),
}

PROVIDERS: dict[str, HVPProvider] = {
    "ReverseOverReverse()": ReverseOverReverse(),
    "ReverseOverReverse(keep_graph=True)": REVERSE,
    "ForwardOverReverse()": ForwardOverReverse(),
    "FiniteDifference()": FiniteDifference(),
    "FiniteDifference(central=False)": FiniteDifference(central=False),
    "GaussNewton()": GaussNewton(),
}


def network(width: int, activation: type[nn.Module]) -> nn.Module:
    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, outputs, 3, stride, 1),
            nn.BatchNorm2d(outputs, track_running_stats=False),
            activation(),
        ]

    layers = [*block(1, width, 1), *block(width, 2 * width, 2), *block(2 * width, 2 * width, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 16))


class Contrastive(Problem):
    """L = NT-Xent of two views, with the proximal regularizer; F = cross-entropy of a fixed linear head."""

    curvature_depends_on_upper = False

    def __init__(self, module: nn.Module, head: Tensor, weight: float) -> None:
        self.module, self.head, self.regularization_weight = module, head, weight

    def lower_outputs(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        z = nn.functional.normalize(torch.cat([functional_call(self.module, lower, (view,)) for view in batch]))
        return (z @ z.T / 0.5).fill_diagonal_(-1e9)

    def lower_output_loss(self, upper: Params, outputs: Tensor, batch: Tensor) -> Tensor:
        other_view = torch.arange(len(outputs)).roll(len(outputs) // 2)
        return nn.functional.cross_entropy(outputs, other_view)

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return self.lower_output_loss(upper, self.lower_outputs(upper, lower, batch), batch)

    def upper_objective(self, upper: Params, lower: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(functional_call(self.module, lower, (images,)) @ self.head, labels)

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return proximal(upper, lower)


class Setting:
    """A trained network with its batches, in float64."""

    def __init__(self, *, width: int, activation: type[nn.Module], batch_size: int, batches: int, steps: int) -> None:
        torch.manual_seed(0)
        pixels, classes = load_digits(return_X_y=True)
        images = torch.from_numpy(pixels).reshape(-1, 1, 8, 8) / 16.0 - 0.5
        labels = torch.from_numpy(classes)
        self.module = network(width, activation).double()
        self.head = torch.randn(16, 10, dtype=torch.float64) / 4.0

        def views() -> Tensor:
            chosen = images[torch.randint(len(images), (batch_size,))]
            shifted = [chosen.roll(tuple(torch.randint(-1, 2, (2,)).tolist()), dims=(2, 3)) for _ in range(2)]
            return torch.stack([view + 0.1 * torch.randn_like(view) for view in shifted])

        self.lower = {name: p.detach().clone() for name, p in self.module.named_parameters()}
        self._train(views, steps)
        self.batches = [views() for _ in range(batches)]
        self.other_batches = [views() for _ in range(batches)]
        self.labelled = [(images[i::40], labels[i::40]) for i in range(RIGHT_HAND_SIDES)]

    def _train(self, views: Callable[[], Tensor], steps: int) -> None:
        variables = {name: value.requires_grad_() for name, value in self.lower.items()}
        optimizer = torch.optim.Adam(variables.values(), lr=3e-3)
        for _ in range(steps):
            loss = self.problem(0.0).lower_objective({}, variables, views())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.lower = {name: value.detach() for name, value in variables.items()}

    def problem(self, weight: float) -> Contrastive:
        return Contrastive(self.module, self.head, weight)

    def right_hand_sides(self) -> list[Params]:
        problem, y = self.problem(0.0), {name: value.clone().requires_grad_() for name, value in self.lower.items()}
        gradients = []
        for batch in self.labelled:
            values = torch.autograd.grad(problem.upper_objective({}, y, batch), list(y.values()))
            gradients.append(dict(zip(y, values, strict=True)))
        return gradients

    def product(self, batch: Tensor, vector: Tensor) -> Tensor:
        """H w on one batch by plain double backward."""
        y = joined(self.lower).requires_grad_()
        loss = self.problem(0.0).lower_objective({}, split(y, self.lower), batch)
        (g,) = torch.autograd.grad(loss, y, create_graph=True)
        return torch.autograd.grad(g, y, vector)[0]

    def hessian(self, batches: Sequence[Tensor]) -> Tensor:
        """H by plain double backward, many columns at a time."""
        y = joined(self.lower).requires_grad_()
        basis = torch.eye(y.numel(), dtype=y.dtype)
        total = torch.zeros_like(basis)
        for batch in batches:
            loss = self.problem(0.0).lower_objective({}, split(y, self.lower), batch)
            (g,) = torch.autograd.grad(loss, y, create_graph=True)
            for columns in basis.split(64):
                rows = torch.autograd.grad(g, y, columns, retain_graph=True, is_grads_batched=True)[0]
                first = int(columns[0].argmax())
                total[first : first + len(columns)] += rows
        matrix = total / len(batches)
        return 0.5 * (matrix + matrix.T)


def joined(x: Params) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in x.values()])


def split(vector: Tensor, like: Params) -> Params:
    parts = vector.split([leaf.numel() for leaf in like.values()])
    return {name: part.reshape(leaf.shape) for (name, leaf), part in zip(like.items(), parts, strict=True)}


@dataclass(frozen=True)
class Spectra:
    """Dense Hessians of the two disjoint sets of batches."""

    first: Tensor
    second: Tensor

    def solutions(self, c: float, rights: Sequence[Params]) -> tuple[list[Tensor], float]:
        """Exact x of (I + H/c) x = b for every b, and the median distance to those of the other batches."""
        identity = torch.eye(len(self.first), dtype=self.first.dtype)
        exact = [torch.linalg.solve(identity + self.first / c, joined(b)) for b in rights]
        others = [torch.linalg.solve(identity + self.second / c, joined(b)) for b in rights]
        return exact, statistics.median(relative(x, y) for x, y in zip(others, exact, strict=True))


def measure_solvers(setting: Setting, spectra: Spectra, weights: Sequence[float]) -> dict[str, Any]:
    """Median error over the right-hand sides, products and the worst status, for every solver and every c."""
    rights = setting.right_hand_sides()[:3]
    first = spectra.first
    identity = torch.eye(len(first), dtype=torch.float64)
    rows, systems = [], []
    for c in weights:
        exact, noise = spectra.solutions(c, rights)
        spectrum = torch.linalg.eigvalsh(identity + first / c)
        systems.append({"c": c, "smallest": float(spectrum[0]), "largest": float(spectrum[-1]), "noise": noise})
        for name, (solver, hvp) in SOLVERS.items():
            operator = _operator(setting, identity + first / c, c, hvp)
            state = solver.prepare(operator)
            solutions = [solver.solve(operator, b, state=state) for b in rights]
            errors = [relative(joined(s.value), x) for s, x in zip(solutions, exact, strict=True)]
            statuses = {s.status.name for s in solutions}
            rows.append(
                {
                    "solver": name,
                    "c": c,
                    "error": statistics.median(errors),
                    "first_products": solutions[0].num_hvps,
                    "products": statistics.median([s.num_hvps for s in solutions[1:]]),
                    "shifted": any(s.tikhonov > 0.0 for s in solutions),
                    "status": statuses.pop() if len(statuses) == 1 else "MIXED",
                }
            )
    return {"variables": len(first), "systems": systems, "solvers": rows}


def _operator(setting: Setting, matrix: Tensor, c: float, hvp: HVPProvider) -> LinearOperator:
    """A by its dense matrix, which gives the exact providers' products in a fraction of their time."""
    if hvp == REVERSE:
        return FunctionOperator(lambda x: split(matrix @ joined(x), x))
    return linearize(setting.problem(c), setting.lower, setting.lower, setting.batches, hvp=hvp).operator


def measure_providers(settings: dict[str, Setting], repeats: int) -> list[dict[str, Any]]:
    """Error of a product with H in float64 and float32, and its time in plain gradients of the same objective."""
    rows = []
    for activation, setting in settings.items():
        exact = setting.product(setting.batches[0], joined(setting.right_hand_sides()[0]))
        for dtype in (torch.float64, torch.float32):
            values, times = products(setting, dtype, repeats)
            for name, value in values.items():
                rows.append(
                    {
                        "activation": activation,
                        "dtype": str(dtype).removeprefix("torch."),
                        "provider": name,
                        "error": relative(value, exact),
                        "gradients": times[name].record(),
                    }
                )
    return rows


def products(setting: Setting, dtype: torch.dtype, repeats: int) -> tuple[dict[str, Tensor], dict[str, Timing]]:
    """Each provider's product on the first batch, and its time in gradients."""
    lower = {name: value.to(dtype) for name, value in setting.lower.items()}
    w = {name: value.to(dtype) for name, value in setting.right_hand_sides()[0].items()}
    batch, problem = setting.batches[0].to(dtype), setting.problem(0.0)
    functions: dict[str, Callable[[], Params]] = {"gradient": lambda: lower_gradient(problem, lower, lower, batch)}
    for name, provider in PROVIDERS.items():
        operator = linearize(problem, lower, lower, [batch], hvp=provider).operator
        functions[name] = lambda operator=operator: operator(w)
    values = {name: joined(functions[name]()).double() for name in PROVIDERS}
    seconds = interleaved(functions, repeats)
    return values, {name: seconds[name].over(seconds["gradient"]) for name in PROVIDERS}


def settings(*, quick: bool) -> dict[str, Setting]:
    """One network for each activation."""
    size = {"batch_size": 8, "batches": 2, "steps": 5} if quick else {"batch_size": 32, "batches": 4, "steps": 300}
    width = 1 if quick else 4
    return {
        "ReLU": Setting(width=width, activation=nn.ReLU, **size),
        "SiLU": Setting(width=width, activation=nn.SiLU, **size),
    }


def spectra(setting: Setting) -> Spectra:
    return Spectra(setting.hessian(setting.batches), setting.hessian(setting.other_batches))
