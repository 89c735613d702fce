"""Linear models whose pretext and downstream tasks disagree by a dial, with a lower and an upper level as in BiSSL.

In the eigenbasis of the pretext Hessian H = diag(h), with weights y of the lower and x of the upper level:

    lower:  y*(x) = argmin_y 1/2 (y - a)' H (y - a) + lambda/2 |y - x|^2
    upper:  F(x) = L(y*(x)) + gamma L(x),   L(y) = 1/(2n) |U y - t|^2,   t = U w + noise,   rows of U from N(0, S)
    step:   x <- x - rate (p + gamma grad L(x)),   p = v, or A^{-1} v, or some iterations of CG,   v = grad L(y)
            A = I + H/c,   c = lambda + damping,   H the population's or that of a few rows

The risk of y on new data, above that of the noise alone, is 1/2 (y - w)' S (y - w). The tasks disagree by w - a: its
length and how it lies to the eigenvalues of H are the dial. With M = (I + H/lambda)^-1 and a solved lower level, a step
moves y by -rate M p: M v with x = v, M M v with the solve (without damping), where fine-tuning moves it by v.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 40
"""Weights."""

RATES = (0.02, 0.1, 0.3, 1.0, 1.8)
"""Upper rates, in multiples of 1/L for the largest curvature L of the arm's own steps: 2 is where they diverge."""

ARMS = ("fine-tuning", "identity", "CG(1)", "CG(3)", "solve")


@dataclass(frozen=True)
class Setting:
    """The dials.

    Attributes:
        condition: largest over smallest eigenvalue of H, which are spaced evenly in their logarithm, with mean 1.
        disagreement: length of w - a, where that of a is 1.
        flatness: how w - a lies: variance of its part along an eigenvector ~ eigenvalue^-flatness. Above 0 the tasks
            disagree where the pretext loss is flat, below where it is steep.
        matched: that variance ~ (1 + eigenvalue/lambda)^-flatness instead: 0, 1 and 2 are what fine-tuning, x = v and
            the solve take for granted.
        labels: labelled rows to train on; as many choose rate and step.
        noise: deviation of a label.
        proximity: lambda; the mean eigenvalue of H is 1.
        damping: added to lambda in the system alone.
        gamma: weight of the upper loss of x itself.
        hessian_rows: rows of H in A, fresh in every alternation; None for the population's H.
        lower_steps: gradient steps of the lower level from where it was; None where it is solved.
        alternations: upper steps of a training, after each of which the lower level is solved.
        shared: whether S is H (one set of inputs), or the identity.
    """

    condition: float = 100.0
    disagreement: float = 0.5
    flatness: float = 1.0
    matched: bool = False
    labels: int = 40
    noise: float = 0.3
    proximity: float = 0.3
    damping: float = 0.0
    gamma: float = 0.0
    hessian_rows: int | None = None
    lower_steps: int | None = None
    alternations: int = 50
    shared: bool = True

    @property
    def c(self) -> float:
        return self.proximity + self.damping


@dataclass(frozen=True)
class Draws:
    """Problems of one setting, one a seed, stacked: [B, SIZE] vectors, [B, SIZE, SIZE] matrices, all float64.

    Attributes:
        h: eigenvalues of H, [SIZE].
        s: those of S.
        a, w: the pretext's and the downstream task's true weights.
        S_train, g_train: Hessian of the labels' loss, and minus its gradient at 0; `_val` of those that validate.
        H_rows: [alternations, B, SIZE, SIZE], the Hessians of A; None for the population's.
    """

    setting: Setting
    h: Tensor
    s: Tensor
    a: Tensor
    w: Tensor
    S_train: Tensor
    g_train: Tensor
    S_val: Tensor
    g_val: Tensor
    H_rows: Tensor | None

    def gradient(self, y: Tensor) -> Tensor:
        """v of the training labels at y, [..., B, SIZE]."""
        return times(self.S_train, y) - self.g_train

    def validation(self, y: Tensor) -> Tensor:
        """Loss of the validating labels, but for a constant."""
        return (0.5 * times(self.S_val, y) - self.g_val).mul(y).sum(-1)

    def risk(self, y: Tensor) -> Tensor:
        """1/2 (y - w)' S (y - w)."""
        return 0.5 * ((y - self.w) ** 2 * self.s).sum(-1)

    def system(self, alternation: int) -> Tensor:
        """A of an alternation, [B, SIZE, SIZE]."""
        H = torch.diag(self.h).expand(len(self.a), -1, -1) if self.H_rows is None else self.H_rows[alternation]
        return torch.eye(SIZE, dtype=H.dtype) + H / self.setting.c

    def lower(self, x: Tensor, y: Tensor) -> Tensor:
        """The lower level at x: its solution, or y after so many gradient steps of length 1/(largest h + lambda)."""
        weight, steps = self.setting.proximity, self.setting.lower_steps
        solution = (self.h * self.a + weight * x) / (self.h + weight)
        if steps is None:
            return solution
        contraction = (1.0 - (self.h + weight) / (self.h.max() + weight)) ** steps
        return solution + contraction * (y - solution)

    def stationarity(self, x: Tensor, y: Tensor) -> Tensor:
        """Length of the lower gradient at (x, y)."""
        return torch.linalg.vector_norm(self.h * (y - self.a) + self.setting.proximity * (y - x), dim=-1)


def draw(setting: Setting, seeds: int, first: int = 0) -> Draws:
    """Problems of the seeds first, first + 1, ...; a seed's draws are the same whatever the others are."""
    h = torch.logspace(0.0, -1.0, SIZE, base=setting.condition, dtype=torch.float64)
    h = h / h.mean()
    s = h if setting.shared else torch.ones_like(h)
    shape = (1.0 + h / setting.proximity if setting.matched else h) ** -setting.flatness
    shape = (shape / shape.sum()).sqrt()
    rows: list[tuple[Tensor, ...]] = []
    for seed in range(first, first + seeds):
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*size, dtype=torch.float64, generator=generator)

        a = normal(SIZE) / SIZE**0.5
        w = a + setting.disagreement * shape * normal(SIZE)
        drawn = [a, w]
        for _ in range(2):
            U = normal(setting.labels, SIZE) * s.sqrt()
            t = U @ w + setting.noise * normal(setting.labels)
            drawn += [U.T @ U / setting.labels, U.T @ t / setting.labels]
        if setting.hessian_rows is not None:
            Z = normal(setting.alternations, setting.hessian_rows, SIZE) * h.sqrt()
            drawn.append(Z.mT @ Z / setting.hessian_rows)
        rows.append(tuple(drawn))
    stacked = [torch.stack(parts) for parts in zip(*rows, strict=True)]
    batches = stacked[6].transpose(0, 1) if setting.hessian_rows is not None else None
    a, w, S_train, g_train, S_val, g_val = stacked[:6]
    return Draws(setting, h, s, a, w, S_train, g_train, S_val, g_val, batches)


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """[B, n, n] times [..., B, n]."""
    return torch.einsum("bij,...bj->...bi", matrix, vector)


def conjugate_gradients(A: Tensor, v: Tensor, iterations: int) -> Tensor:
    """So many iterations of CG from 0 for A x = v, [B, n, n] and [..., B, n]."""
    x, residual = torch.zeros_like(v), v
    direction, square = residual, residual.square().sum(-1, keepdim=True)
    for _ in range(iterations):
        product = times(A, direction)
        # 0/0 where it is solved already.
        step = (square / (direction * product).sum(-1, keepdim=True)).nan_to_num(0.0)
        x, residual = x + step * direction, residual - step * product
        new = residual.square().sum(-1, keepdim=True)
        direction, square = residual + (new / square).nan_to_num(0.0) * direction, new
    return x


def direction_of(arm: str, A: Tensor) -> Callable[[Tensor], Tensor]:
    """v -> p of the arm in one alternation."""
    if arm == "identity":
        return lambda v: v
    if arm == "solve":
        inverse = torch.linalg.inv(A)
        return lambda v: times(inverse, v)
    iterations = int(arm.removeprefix("CG(").removesuffix(")"))
    return lambda v: conjugate_gradients(A, v, iterations)


def largest_curvature(draws: Draws, arm: str) -> Tensor:
    """L of a step of the arm, [B]: the spectral radius of what multiplies x in p + gamma grad L(x)."""
    if arm == "fine-tuning":
        return torch.linalg.eigvalsh(draws.S_train)[:, -1]
    setting = draws.setting
    mobility = torch.diag(setting.proximity / (draws.h + setting.proximity))
    product = draws.S_train @ mobility
    if arm != "identity":
        product = torch.linalg.solve(draws.system(0), product)
    return torch.linalg.eigvals(product + setting.gamma * draws.S_train).abs().amax(-1)


@dataclass(frozen=True)
class Trained:
    """What a training ends with, [B]: `fall` of the validation loss from the start, and the `risk`."""

    fall: Tensor
    risk: Tensor


def train(draws: Draws, arm: str, alternations: int | None = None) -> Trained:
    """Each seed at the rate and step of least validation loss, the start among them; all alternations, or so many."""
    rates = torch.tensor(RATES, dtype=torch.float64)[:, None, None] / largest_curvature(draws, arm)[:, None]
    x = draws.a.expand(len(RATES), -1, -1)
    y, gamma = x, draws.setting.gamma
    start, risk = draws.validation(draws.a), draws.risk(draws.a)
    best = start
    for alternation in range(alternations or draws.setting.alternations):
        if arm == "fine-tuning":
            y = y - rates * draws.gradient(y)
        else:
            p = direction_of(arm, draws.system(alternation))(draws.gradient(y))
            x = x - rates * (p + gamma * draws.gradient(x))
            y = draws.lower(x, y)
        values, index = _finite(draws.validation(y)).min(0)
        better = values < best
        best = torch.where(better, values, best)
        risk = torch.where(better, draws.risk(y).gather(0, index[None])[0], risk)
    return Trained(start - best, risk)


def _finite(values: Tensor) -> Tensor:
    """What has diverged is never the best."""
    return values.nan_to_num(nan=torch.inf, neginf=torch.inf)
