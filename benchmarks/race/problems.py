"""The two problems of the race, each with a judge: F(x, y*(x)) with y* solved exactly, outside every clock."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy, one_hot

Batch = tuple[Tensor, ...]
Loss = Callable[[Tensor, Tensor, Batch], Tensor]


@dataclass(frozen=True)
class Rates:
    """Step sizes of the two levels' optimizers, a point of the grid."""

    lower: float
    upper: float


@dataclass(frozen=True)
class Race:
    """A bilevel problem with one tensor a level, and what all contestants share.

    Attributes:
        upper, lower: where x and y start.
        lower_loss, upper_loss: of (x, y, batch).
        lower_rows, upper_rows: all data of a level.
        batch_size: rows of a batch; None takes all rows every time.
        value: F(x, y*(x)) with y* re-solved.
        batches: lower batches whose mean an implicit method takes its system from.
        grid: the step sizes that every method may choose from.
    """

    name: str
    upper: Tensor
    lower: Tensor
    lower_loss: Loss
    upper_loss: Loss
    lower_rows: Batch
    upper_rows: Batch
    batch_size: int | None
    value: Callable[[Tensor], float]
    batches: int
    grid: tuple[Rates, ...]

    def lower_batch(self, generator: Generator) -> Batch:
        """Rows drawn with replacement."""
        return self._batch(self.lower_rows, generator)

    def upper_batch(self, generator: Generator) -> Batch:
        """Rows drawn with replacement."""
        return self._batch(self.upper_rows, generator)

    def _batch(self, rows: Batch, generator: Generator) -> Batch:
        if self.batch_size is None:
            return rows
        chosen = torch.randint(len(rows[0]), (self.batch_size,), generator=generator)
        return tuple(t[chosen] for t in rows)


def grid(lower: tuple[float, ...], upper: tuple[float, ...]) -> tuple[Rates, ...]:
    return tuple(Rates(a, b) for a in lower for b in upper)


def hyper_cleaning(*, points: int = 800, wrong: float = 0.3, weight: float = 0.003) -> Race:
    """One weight sigmoid(x_i) an example of digits, three in ten of which have wrong labels; F on 200 clean ones.

    Lower level: weighted cross-entropy of a linear classifier, all examples a step, with weight/2 ||y||^2.
    """
    generator = torch.Generator().manual_seed(0)
    pixels, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(classes), generator=generator)[: points + 200]
    images, labels = torch.from_numpy(pixels)[order].float() / 16.0, torch.from_numpy(classes)[order]
    X = torch.cat([images, torch.ones(len(images), 1)], dim=1)
    shift = torch.randint(1, 10, (points,), generator=generator)
    mislabelled = torch.rand(points, generator=generator) < wrong
    noisy = torch.where(mislabelled, (labels[:points] + shift) % 10, labels[:points])
    train, clean = (X[:points], noisy), (X[points:], labels[points:])

    def lower_loss(x: Tensor, y: Tensor, batch: Batch) -> Tensor:
        inputs, target = batch
        fit = (x.sigmoid() * cross_entropy(inputs @ y, target, reduction="none")).mean()
        return fit + 0.5 * weight * y.square().sum()

    def upper_loss(x: Tensor, y: Tensor, batch: Batch) -> Tensor:
        return cross_entropy(batch[0] @ y, batch[1])

    judge = WeightedClassifier(train[0].double(), noisy, weight)

    def value(x: Tensor) -> float:
        y = judge.solve(x.detach().double().sigmoid())
        return float(cross_entropy(clean[0].double() @ y, clean[1]))

    return Race(
        name="hyper-cleaning",
        upper=torch.zeros(points),
        lower=torch.zeros(X.shape[1], 10),
        lower_loss=lower_loss,
        upper_loss=upper_loss,
        lower_rows=train,
        upper_rows=clean,
        batch_size=None,
        value=value,
        batches=1,
        grid=grid((0.3, 1.0), (0.03, 0.1, 0.3)),
    )


class WeightedClassifier:
    """Minimizes 1/n sum_i s_i CE(X_i W, t_i) + weight/2 ||W||^2 by Newton's method, from the last solution on."""

    def __init__(self, X: Tensor, target: Tensor, weight: float) -> None:
        self.X, self.target, self.weight = X, target, weight
        self.W = torch.zeros(X.shape[1], 10, dtype=X.dtype)

    def objective(self, W: Tensor, s: Tensor) -> Tensor:
        losses = cross_entropy(self.X @ W, self.target, reduction="none")
        return (s * losses).mean() + 0.5 * self.weight * W.square().sum()

    def solve(self, s: Tensor, tolerance: float = 1e-9) -> Tensor:
        """
        Raises:
            RuntimeError: the gradient's norm is still above the tolerance after 100 steps.
        """
        n, (features, classes) = len(self.X), self.W.shape
        for _ in range(100):
            p = (self.X @ self.W).softmax(1)
            gradient = self.X.T @ (s[:, None] * (p - one_hot(self.target, classes))) / n + self.weight * self.W
            if float(gradient.norm()) < tolerance:
                return self.W
            outer = ((s / n).sqrt()[:, None, None] * self.X[:, :, None] * p[:, None, :]).reshape(n, -1)
            hessian = (-(outer.T @ outer)).reshape(features, classes, features, classes)
            for c in range(classes):
                hessian[:, c, :, c] += self.X.T @ ((s * p[:, c] / n)[:, None] * self.X)
            matrix = hessian.reshape(self.W.numel(), -1) + self.weight * torch.eye(self.W.numel(), dtype=self.X.dtype)
            step = torch.linalg.solve(matrix, gradient.reshape(-1)).reshape_as(self.W)
            size, start = 1.0, self.objective(self.W, s)
            while size > 1e-6 and self.objective(self.W - size * step, s) > start:
                size *= 0.5
            self.W = self.W - size * step
        raise RuntimeError(f"the judge's Newton iteration did not reach {tolerance}")


def stochastic_quadratic(*, rows: int = 2000, lower_size: int = 100, upper_size: int = 50) -> Race:
    """Least squares below and above, both seen through batches of 64 rows with noise; strongly convex below.

    G(x, y) = 1/2 mean_i (z_i'y - u_i'x - e_i)^2 + 0.005 ||y||^2,  F(x, y) = 1/2 mean_j (w_j'y - s_j)^2 + 0.005 ||x||^2.
    """
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    Z = normal(rows, lower_size) * torch.logspace(-0.75, 0.25, lower_size, dtype=torch.float64)
    U = normal(rows, upper_size)
    coupling = normal(upper_size, lower_size) / upper_size**0.5
    e = normal(rows) + ((U @ coupling) * Z).sum(1)
    U = U / upper_size**0.5 + Z @ coupling.T / lower_size**0.5
    W, s = normal(500, lower_size), normal(500) * 3.0
    curvature = Z.T @ Z / rows + 0.01 * torch.eye(lower_size, dtype=torch.float64)

    def lower_loss(x: Tensor, y: Tensor, batch: Batch) -> Tensor:
        z, u, noise = batch
        return 0.5 * (z @ y - u @ x - noise).square().mean() + 0.005 * y.square().sum()

    def upper_loss(x: Tensor, y: Tensor, batch: Batch) -> Tensor:
        w, target = batch
        return 0.5 * (w @ y - target).square().mean() + 0.005 * x.square().sum()

    def value(x: Tensor) -> float:
        x = x.detach().double()
        y = torch.linalg.solve(curvature, Z.T @ (U @ x + e) / rows)
        return float(upper_loss(x, y, (W, s)))

    return Race(
        name="stochastic quadratic",
        upper=torch.zeros(upper_size),
        lower=torch.zeros(lower_size),
        lower_loss=lower_loss,
        upper_loss=upper_loss,
        lower_rows=tuple(t.float() for t in (Z, U, e)),
        upper_rows=tuple(t.float() for t in (W, s)),
        batch_size=64,
        value=value,
        batches=5,
        grid=grid((0.01, 0.03), (0.03, 0.1, 0.3)),
    )
