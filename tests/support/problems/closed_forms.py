"""Bilevel problems whose hypergradients are known in closed form."""

import torch
from torch import Tensor

from bilevel import CG, Hypergradient, Method, Neumann, Params, Problem, hypergradient, proximal
from bilevel.hypergradients import OnFailure
from bilevel.linear import Dense, Solver
from bilevel.products import ForwardOverReverse, HVPProvider, ReverseOverReverse
from tests.support.cases import joined, vector, with_spectrum

SOLVERS: list[Solver] = [CG(100, rtol=1e-12), Neumann(1500, rtol=1e-10), Dense()]
PROVIDERS: list[HVPProvider] = [ReverseOverReverse(), ReverseOverReverse(keep_graph=True), ForwardOverReverse()]
NO_BATCH = [None]


def relative_error(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


class QuadraticBilevel(Problem):
    """G = 1/2 y'Ay + x'Cy + a'y; F = 1/2 |y - t|^2 + 1/2 |x|^2."""

    curvature_depends_on_upper = False
    A = with_spectrum([0.5, 0.8, 1.0, 2.0, 3.0])
    C = vector(20, 1).reshape(4, 5)
    a = vector(5, 2)
    t = vector(5, 3)

    def lower_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
        y, x = joined(lower), joined(upper)
        return 0.5 * y @ self.A @ y + x @ self.C @ y + self.a @ y

    def upper_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
        return 0.5 * (joined(lower) - self.t).square().sum() + 0.5 * joined(upper).square().sum()

    def solution(self, upper: Params) -> Tensor:
        return -torch.linalg.solve(self.A, self.C.T @ joined(upper) + self.a)


def quadratic() -> tuple[QuadraticBilevel, Params, Params]:
    problem = QuadraticBilevel()
    upper = {"x": vector(3, 4), "scale": vector(1, 5)[0]}
    y = problem.solution(upper)
    return problem, upper, {"head": y[:1].reshape(()), "body": y[1:].reshape(2, 2)}


def run(
    problem: Problem,
    upper: Params,
    lower: Params,
    method: Method | Solver | None = None,
    *,
    on_failure: OnFailure = "warn",
) -> Hypergradient:
    return hypergradient(problem, upper, lower, method, upper_batch=None, lower_batches=NO_BATCH, on_failure=on_failure)


class Ridge(Problem):
    """Linear regression with a log-weight for all features, or one for each."""

    X = vector(60, 6).reshape(12, 5)
    target = vector(12, 7)
    X_val = vector(40, 8).reshape(8, 5)
    target_val = vector(8, 9)

    def lower_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
        fit = 0.5 * (self.X @ lower["y"] - self.target).square().mean()
        return fit + 0.5 * (upper["log_weight"].exp() * lower["y"].square()).sum()

    def upper_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
        return 0.5 * (self.X_val @ lower["y"] - self.target_val).square().mean()


class Proximal(Problem):
    """iMAML and BiSSL: a loss of y alone, tied to x by lambda/2 |y - x|^2."""

    curvature_depends_on_upper = False
    regularization_weight = 2.0
    data = vector(40, 11).reshape(8, 5)

    def lower_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
        return torch.log(torch.cosh(self.data @ joined(lower))).mean() + 0.1 * (joined(lower) ** 4).sum()

    def upper_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
        return (joined(lower) - 1.0).square().sum() + 0.3 * joined(upper).cos().sum()

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return proximal(upper, lower)

    def hessian(self, lower: Params) -> Tensor:
        def flat(y: Tensor) -> Tensor:
            return torch.log(torch.cosh(self.data @ y)).mean() + 0.1 * (y**4).sum()

        hessian = torch.autograd.functional.hessian(flat, joined(lower))
        assert isinstance(hessian, Tensor)
        return hessian


def proximal_point() -> tuple[Proximal, Params, Params]:
    y, x = vector(5, 12), vector(5, 13)
    return Proximal(), {"a": x[:2], "b": x[2:]}, {"a": y[:2], "b": y[2:]}
