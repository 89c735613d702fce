"""A quadratic bilevel problem whose two levels are means over samples, with its directions in dense algebra."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bilevel import Params, Problem
from bilevel.hypergradients import Method, MethodState, Proposal, UpperStep
from bilevel.lower import Draw
from bilevel.training import Blocks
from tests.support.cases import joined, vector, with_spectrum

X, Y, R = 4, 7, 5
"""Upper variables, lower ones, and those of the latter that respond: the first ones."""

LOWER, UPPER = 7, 5
"""Samples, so that blocks of two leave a smaller last one."""


def _symmetric(count: int, size: int, seed: int, least: float) -> Tensor:
    spectrum = [least + 0.5 * k / size for k in range(size)]
    return torch.stack([with_spectrum(spectrum, seed + k) for k in range(count)])


class SampledQuadratic(Problem):
    """A batch is the samples' numbers. G_i = 1/2 y'A_i y + x'C_i y + a_i'y + weight/2 |y - N x|^2, and
    F_j = 1/2 y'B_j y - b_j'y + x'E_j y + 1/2 |x|^2 - c_j'x."""

    regularization_weight = 0.3
    A = _symmetric(LOWER, Y, 10, 0.6)
    C = 0.3 * vector(LOWER * X * Y, 1).reshape(LOWER, X, Y)
    a = vector(LOWER * Y, 2).reshape(LOWER, Y)
    N = 0.4 * vector(Y * X, 3).reshape(Y, X)
    B = _symmetric(UPPER, Y, 50, 0.4)
    b = vector(UPPER * Y, 4).reshape(UPPER, Y)
    E = 0.1 * vector(UPPER * X * Y, 5).reshape(UPPER, X, Y)
    c = vector(UPPER * X, 6).reshape(UPPER, X)

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        x, y = joined(upper), joined(lower)
        A, C, a = self.A[batch].mean(0), self.C[batch].mean(0), self.a[batch].mean(0)
        return 0.5 * y @ A @ y + x @ C @ y + a @ y

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return 0.5 * (joined(lower) - self.N @ joined(upper)).square().sum()

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        x, y = joined(upper), joined(lower)
        B, b, E, c = (part[batch].mean(0) for part in (self.B, self.b, self.E, self.c))
        return 0.5 * y @ B @ y - b @ y + x @ E @ y + 0.5 * x @ x - c @ x

    def implicit(self, name: str) -> bool:
        return name != "held"


PROBLEM = SampledQuadratic()


def variables(seed: int = 7) -> tuple[Params, Params]:
    x, y = vector(X, seed), vector(Y, seed + 1)
    return {"scale": x[0].clone(), "x": x[1:].clone()}, {
        "w": y[:4].reshape(2, 2).clone(),
        "b": y[4].clone(),
        "held": y[5:].clone(),
    }


def blocks(level: str, size: int | None = 2, seed: int = 0) -> Blocks:
    """A level's samples in blocks of `size`, or all in one."""
    count = {"lower": LOWER, "upper": UPPER}[level]
    return Blocks(count, size or count, lambda indices: indices, seed=seed)


def draw(source: Blocks, block: int) -> Draw:
    return Draw(source.block(block), block, block, source.weight(block))


@dataclass(frozen=True)
class Below:
    """What a lower sample gives at (x, y, v): dG/dy, d2G/dydy v, d2G/dxdy v, and dG/dx."""

    gradient: Tensor
    product: Tensor
    cross: Tensor
    upper: Tensor


def below(x: Tensor, y: Tensor, v: Tensor, sample: Draw) -> Below:
    p, weight, mu, n = PROBLEM, sample.weight, PROBLEM.regularization_weight, PROBLEM.N
    A, C, a = (part[sample.batch].mean(0) for part in (p.A, p.C, p.a))
    H, J, apart = A + mu * torch.eye(Y, dtype=A.dtype), C - mu * n.T, y - n @ x
    parts = A @ y + C.T @ x + a + mu * apart, H[:R, :R] @ v, J[:, :R] @ v, C @ y - mu * n.T @ apart
    return Below(*(weight * part for part in parts))


def above(x: Tensor, y: Tensor, sample: Draw) -> tuple[Tensor, Tensor]:
    """dF/dx, and dF/dy over the variables that respond."""
    p, weight = PROBLEM, sample.weight
    B, b, E, c = (part[sample.batch].mean(0) for part in (p.B, p.b, p.E, p.c))
    return weight * (x - c + E @ y), weight * (B @ y - b + E.T @ x)[:R]


WHOLE = draw(blocks("lower", None), 0), draw(blocks("upper", None), 0)


def hessian(sample: Draw = WHOLE[0]) -> Tensor:
    """d2G/dydy over the variables that respond."""
    return torch.stack([below(torch.zeros(X).double(), torch.zeros(Y).double(), e, sample).product for e in eye(R)]).T


def cross(sample: Draw = WHOLE[0]) -> Tensor:
    """d2G/dxdy, [X, R]."""
    return torch.stack([below(torch.zeros(X).double(), torch.zeros(Y).double(), e, sample).cross for e in eye(R)]).T


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def solution() -> tuple[Tensor, Tensor]:
    """(x, y) where y minimises G over all of it, and x has no hypergradient with `held` held fixed."""
    p, mu = PROBLEM, PROBLEM.regularization_weight
    H = p.A.mean(0) + mu * eye(Y)
    J = p.C.mean(0) - mu * p.N.T
    response = torch.linalg.solve(H[:R, :R], J[:, :R].T).T
    B, E = p.B.mean(0), p.E.mean(0)
    # Rows: dF/dx - response dF/dy = 0 and dG/dy = 0, both linear in (x, y).
    top = torch.cat([eye(X) - response @ E.T[:R], E - response @ B[:R]], 1)
    bottom = torch.cat([J.T, H], 1)
    right = torch.cat([p.c.mean(0) - response @ p.b.mean(0)[:R], -p.a.mean(0)])
    found = torch.linalg.solve(torch.cat([top, bottom]), right)
    return found[:X], found[X:]


@dataclass
class Drive:
    """A method's steps one by one, on samples that a test chooses; both levels and v make plain steps."""

    method: Method
    partitions: Mapping[str, Blocks] = field(default_factory=lambda: {n: blocks(n) for n in ("lower", "upper")})
    rates: tuple[float, float] = (0.05, 0.1)
    state: MethodState = field(default_factory=dict)
    number: int = 1

    def __post_init__(self) -> None:
        self.upper, self.lower = variables()

    @property
    def x(self) -> Tensor:
        return joined(self.upper).clone()

    @property
    def y(self) -> Tensor:
        return joined(self.lower).clone()

    @property
    def v(self) -> Tensor:
        return joined(self.state["v"]) if self.state.get("v") else torch.zeros(R, dtype=torch.float64)

    def step(self, lower: Sequence[Draw], upper: Sequence[Draw]) -> UpperStep:
        return UpperStep(
            PROBLEM,
            self.upper,
            self.lower,
            upper[0].batch,
            (),
            lower_draws=tuple(lower),
            upper_draws=tuple(upper),
            lower_blocks=self.partitions["lower"],
            upper_blocks=self.partitions["upper"],
            lower_rate=self.rates[1],
            upper_rate=self.rates[0],
            number=self.number,
        )

    def propose(self, lower: Sequence[Draw], upper: Sequence[Draw]) -> Proposal:
        step = self.step(lower, upper)
        return self.method.propose(step, self.state, self.method.prepare(step, self.state))

    def advance(self, proposal: Proposal) -> None:
        """What a trainer does with a proposal."""
        moves: list[tuple[Params, Any, float]] = [(self.upper, proposal.gradient, self.rates[0])]
        if proposal.lower_gradient is not None:
            moves.append((self.lower, proposal.lower_gradient, self.rates[1]))
        for params, gradient, rate in moves:
            for name, leaf in params.items():
                leaf.sub_(rate * gradient[name])
        proposal.commit()
        self.state = proposal.state
        self.number += 1
