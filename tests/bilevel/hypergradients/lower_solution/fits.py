"""Lower levels whose solution is found here, as functions of upper tensors through `lower_solution`."""

from typing import Any

import torch
from torch import Tensor, nn

from bilevel import CG, Params, Problem, functional_call
from bilevel.hypergradients import LowerSolution, lower_solution
from bilevel.linear import Solver
from tests.support.cases import vector

X, TARGET = vector(60, 6).reshape(12, 5), vector(12, 7)
EXACT = CG(50, rtol=1e-12)


class RidgeFit(Problem):
    """Ridge regression with a log-weight for each feature; it has no upper objective."""

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        inputs, target = batch
        fit = 0.5 * (inputs @ lower["y"] - target).square().mean()
        return fit + 0.5 * (upper["log_weight"].exp() * lower["y"].square()).sum()


class LogisticFit(Problem):
    """Logistic regression with a bias, a weight for each sample and one log-weight of the ridge."""

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        inputs, labels = batch
        logits = inputs @ lower["w"] + lower["bias"]
        losses = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return (upper["weights"].sigmoid() * losses).mean()

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return 0.5 * upper["log_ridge"].exp() * (lower["w"].square().sum() + lower["bias"].square())

    regularization_weight = 0.5


class Network(Problem):
    """A small network with dropout and BatchNorm, drawn towards upper values of its own parameters."""

    regularization_weight = 1.0

    def __init__(self, *, hidden: bool = False) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.4), nn.Linear(4, 1))
        self.call = functional_call_of(net.double())
        self.net = None if hidden else net

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        inputs, target = batch
        return (self.call(lower, inputs).squeeze(1) - target).square().mean()

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return 10.0 * torch.stack([(lower[name] - upper[name]).square().sum() for name in lower]).sum()


def functional_call_of(net: nn.Module) -> Any:
    """A function that no walk through a Problem's attributes finds the module in."""
    return lambda variables, inputs: functional_call(net, variables, inputs)


def ridge_solution(log_weight: Tensor) -> Tensor:
    matrix = X.T @ X / 12 + torch.diag(log_weight.exp().expand(5))
    return torch.linalg.solve(matrix, X.T @ TARGET / 12)


def fitted(log_weight: Tensor, solver: Solver = EXACT, problem: Problem | None = None, **options: Any) -> LowerSolution:
    """The ridge regression's solution with a graph."""
    upper, lower = {"log_weight": log_weight}, {"y": ridge_solution(log_weight)}
    return lower_solution(RidgeFit() if problem is None else problem, upper, lower, [(X, TARGET)], solver, **options)


def logistic_solution(problem: LogisticFit, upper: Params, batch: Any) -> Params:
    """By Newton's method."""
    inputs, labels = batch
    design = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype)], dim=1)
    weights = upper["weights"].detach().sigmoid() / len(inputs)
    ridge = problem.regularization_weight * upper["log_ridge"].detach().exp()
    flat = torch.zeros(design.shape[1], dtype=inputs.dtype)
    for _ in range(12):
        chances = (design @ flat).sigmoid()
        gradient = design.T @ (weights * (chances - labels)) + ridge * flat
        hessian = (design.T * (weights * chances * (1.0 - chances))) @ design + ridge * torch.eye(len(flat)).double()
        flat = flat - torch.linalg.solve(hessian, gradient)
    return {"w": flat[:-1], "bias": flat[-1]}
