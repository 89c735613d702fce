"""The problems of benchmark_bilevel as finite sums: simulated quadratics, data cleaning, hyperparameter selection.

    F(x, y) = 1/m sum_j F_j(x, y),    G(x, y) = 1/n sum_i G_i(x, y)

The recipes are those of https://github.com/benchopt/benchmark_bilevel (Dagreou et al., NeurIPS 2022), the numbers are
drawn here. Data that need no download take the place of its MNIST and ijcnn1.
"""

from dataclasses import dataclass
from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy, logsigmoid, one_hot

from benchmarks.race.finite_sums.reduced import Reduced, ReducedQuadratic, ReSolved
from benchmarks.race.problems import Batch, Loss

BATCH = 64


@dataclass(frozen=True)
class Steps:
    """A point of the grid: both lower step sizes (of y and v), and by how much the upper one is smaller."""

    size: float
    ratio: float

    @property
    def upper(self) -> float:
        return self.size / self.ratio


@dataclass(frozen=True)
class FiniteSum:
    """A bilevel problem of two finite sums, with one vector a level.

    Attributes:
        upper, lower: where x and y start, 1-d.
        lower_data, upper_data: tensors with one row a sample, of which the first is the sample's number; their length
            is a multiple of `BATCH`.
        lower_loss, upper_loss: G and F of (x, y, batch), means over the batch's samples.
        reduced: F(x, y*(x)) of all samples.
        chunk: iterations between two looks at x.
        budget: a run ends after so many oracle calls.
        grid: the steps that every method may choose from.
    """

    name: str
    upper: Tensor
    lower: Tensor
    lower_data: Batch
    upper_data: Batch
    lower_loss: Loss
    upper_loss: Loss
    reduced: Reduced
    chunk: int
    budget: int
    grid: tuple[Steps, ...]


def grid(sizes: tuple[float, ...], ratios: tuple[float, ...]) -> tuple[Steps, ...]:
    return tuple(Steps(size, ratio) for size in sizes for ratio in ratios)


def quadratics(*, samples: int = 1024, size: int = 100, seed: int = 2442, budget: int = 100_000) -> FiniteSum:
    """Random quadratics in (x, y), 1024 in each sum, of 100 + 100 variables; the mean ones have condition 10 in y.

    Each is 1/2 y'Ay + 1/2 x'Bx + x'Cy + a'y + b'x with A, B, C of rank one: A = s s' with E[s s'] of eigenvalues from
    0.1 to 1 in a random basis, B likewise with one eigenvalue 0, E[C] with singular values 0.1, and normal a, b.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        below, above = (quadratic_samples(samples, size, generator) for _ in range(2))
        mean = ReducedQuadratic(below, above)
        if float(torch.linalg.eigvalsh(mean.hessian)[0]) > 0.0:
            break
    return FiniteSum(
        name="quadratics",
        upper=torch.full((size,), -2.0),
        lower=torch.zeros(size),
        lower_data=below,
        upper_data=above,
        lower_loss=quadratic_loss,
        upper_loss=quadratic_loss,
        reduced=mean,
        chunk=2,
        budget=budget,
        grid=grid((0.1, 0.3, 0.5), (0.3, 1.0)),
    )


def quadratic_samples(samples: int, size: int, generator: Generator) -> Batch:
    """Rows, A, B, C, a, b of one sum."""
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)

    def basis() -> Tensor:
        return torch.linalg.qr(normal(size, size))[0]

    def correlated(eigenvalues: Tensor) -> Tensor:
        Q = basis()
        s = normal(samples, size) @ (Q * eigenvalues.sqrt()) @ Q.T
        return s[:, :, None] * s[:, None, :]

    A = correlated(torch.logspace(-1.0, 0.0, size, dtype=torch.float64))
    B = correlated(torch.cat([torch.zeros(1), torch.logspace(-1.0, 0.0, size - 1)]).double())
    z, U, V = normal(samples, size), basis(), basis()
    C = 0.1 * (z @ U.T)[:, :, None] * (z @ V.T)[:, None, :]
    parts = (A, B, C, normal(samples, size), normal(samples, size))
    return torch.arange(samples), *(part.float() for part in parts)


def quadratic_loss(x: Tensor, y: Tensor, batch: Batch) -> Tensor:
    _, A, B, C, a, b = batch

    def forms(matrices: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """left' M right of every sample's M, by one product with a matrix of one row a sample."""
        return matrices.flatten(1) @ torch.outer(left, right).flatten()

    return (0.5 * forms(A, y, y) + 0.5 * forms(B, x, x) + forms(C, x, y) + a @ y + b @ x).mean()


def data_cleaning(
    *, samples: int = 1152, clean: int = 512, wrong: float = 0.5, weight: float = 0.2, budget: int = 1_000_000
) -> FiniteSum:
    """One weight sigmoid(x_i) for each of 1152 digits, whose label is replaced by a random one with probability 1/2.

    G = 1/n sum_i sigmoid(x_i) CE(Y'z_i, t_i) + 0.2 ||Y||^2 with standardised pixels z_i; F is the mean cross-entropy of
    512 digits with right labels.
    """
    generator = torch.Generator().manual_seed(32)
    pixels, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(classes), generator=generator)[: samples + clean]
    images, labels = torch.from_numpy(pixels)[order], torch.from_numpy(classes)[order]
    first = images[:samples]
    scale = first.std(0, correction=0)
    Z = (images - first.mean(0)) / torch.where(scale > 0, scale, 1.0)
    replaced = torch.rand(samples, generator=generator) < wrong
    noisy = torch.where(replaced, torch.randint(0, 10, (samples,), generator=generator), labels[:samples])
    below = (torch.arange(samples), Z[:samples].float(), noisy)
    above = (torch.arange(clean), Z[samples:].float(), labels[samples:])

    def lower_loss(x: Tensor, y: Tensor, batch: Batch) -> Tensor:
        rows, z, target = batch
        fit = cross_entropy(z @ y.view(-1, 10), target, reduction="none")
        return (x.index_select(0, rows).sigmoid() * fit).mean() + weight * y.square().sum()

    def upper_loss(x: Tensor, y: Tensor, batch: Batch) -> Tensor:
        _, z, target = batch
        return cross_entropy(z @ y.view(-1, 10), target)

    upper, lower = torch.full((samples,), -2.0), torch.zeros(Z.shape[1] * 10)
    return FiniteSum(
        name="data cleaning",
        upper=upper,
        lower=lower,
        lower_data=below,
        upper_data=above,
        lower_loss=lower_loss,
        upper_loss=upper_loss,
        reduced=ReSolved(upper, lower, lower_loss, below, upper_loss, above),
        chunk=32,
        budget=budget,
        grid=grid((0.1, 0.3, 1.0), (1e-4, 3e-4)),
    )


def hyperparameter_selection(
    *, samples: int = 4992, above: int = 9152, features: int = 22, budget: int = 1_000_000
) -> FiniteSum:
    """One weight exp(x_k) of the ridge penalty for each of 22 features of a logistic regression.

    G = 1/n sum_i log(1 + exp(-t_i z_i'y)) + 1/2 sum_k exp(x_k) y_k^2; F is the mean logistic loss on other samples.
    Simulated after ijcnn1, in a tenth of its samples: ten features say in which of ten states a sample is, twelve are
    uniform, one label in ten is positive, and half of the features have nothing to do with it.
    """
    generator = torch.Generator().manual_seed(0)
    total = samples + above
    state = one_hot(torch.randint(0, 10, (total,), generator=generator), 10).double()
    uniform = 2.0 * torch.rand(total, features - 10, generator=generator, dtype=torch.float64) - 1.0
    Z = torch.cat([state, uniform], dim=1)
    truth = torch.randn(features, generator=generator, dtype=torch.float64) * 2.0
    truth[10::2] = 0.0
    truth[:10] = -2.8 + 0.5 * truth[:10]
    t = torch.where(torch.rand(total, generator=generator, dtype=torch.float64) < (Z @ truth).sigmoid(), 1.0, -1.0)
    below = (torch.arange(samples), Z[:samples].float(), t[:samples].float())
    higher = (torch.arange(above), Z[samples:].float(), t[samples:].float())

    def lower_loss(x: Tensor, y: Tensor, batch: Batch) -> Tensor:
        return upper_loss(x, y, batch) + 0.5 * (x.exp() * y.square()).sum()

    def upper_loss(x: Tensor, y: Tensor, batch: Batch) -> Tensor:
        _, z, target = batch
        return -logsigmoid(target * (z @ y)).mean()

    upper = torch.rand(features, generator=generator).log()
    lower = torch.randn(features, generator=generator)
    return FiniteSum(
        name="hyperparameter selection",
        upper=upper,
        lower=lower,
        lower_data=below,
        upper_data=higher,
        lower_loss=lower_loss,
        upper_loss=upper_loss,
        reduced=ReSolved(upper, lower, lower_loss, below, upper_loss, higher),
        chunk=32,
        budget=budget,
        grid=grid((0.1, 0.3, 1.0), (0.1, 0.3)),
    )
