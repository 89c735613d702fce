"""Dataset distillation: ten learned images, one a class, that take the place of a thousand real ones.

    python examples/distillation.py [--quick]

Lower level: ridge regression from the ten images to their one-hot labels, solved exactly. Upper level: the
cross-entropy of that classifier on 1,000 real training images, over the pixels of the ten. A ridge on all images
minimises squares instead, so that the ten may do better. Data: scikit-learn's digits.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy

from bilevel import CG, AlternatingSchedule, Implicit, Level, Params, Problem, Trainer, hypergradient, ridge
from bilevel.products import ReverseOverReverse

Batch = tuple[Tensor, Tensor]

# Regression targets are 0 and 1: as logits they are too close together for a cross-entropy to go near 0.
SHARPNESS = 10.0
LABELS = torch.arange(10)


class Distillation(Problem):
    """The training images are the upper variables, so the lower level needs no batch of its own."""

    regularization_weight = 0.01

    def lower_objective(self, upper: Params, lower: Params, batch: None) -> Tensor:
        errors = scores(lower, upper["images"]) - one_hot(LABELS)
        return 0.5 * errors.square().sum(dim=1).mean()

    def upper_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        X, t = batch
        return cross_entropy(SHARPNESS * scores(lower, X), t)

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return ridge(lower)

    def reset_lower(self, upper: Params) -> Params:
        return solve(upper["images"], LABELS)


def one_hot(labels: Tensor) -> Tensor:
    return torch.eye(10, dtype=torch.float64)[labels]


def with_constant(images: Tensor) -> Tensor:
    """Pixels and a constant, so that the intercept is one more weight."""
    return torch.cat([images, torch.ones_like(images[:, :1])], dim=1)


def scores(lower: Params, images: Tensor) -> Tensor:
    return with_constant(images) @ lower["w"]


def solve(images: Tensor, labels: Tensor) -> Params:
    """The lower solution on these images; differentiable."""
    A, n = with_constant(images), len(images)
    H = A.T @ A / n + Distillation.regularization_weight * torch.eye(A.shape[1], dtype=A.dtype)
    return {"w": torch.linalg.solve(H, A.T @ one_hot(labels) / n)}


def load() -> tuple[Batch, Batch]:
    """1,000 training and 797 test images."""
    X, t = map(torch.from_numpy, load_digits(return_X_y=True))
    order = torch.randperm(len(t), generator=torch.Generator().manual_seed(100))
    X, t = X[order] / 16, t[order]
    return (X[:1000], t[:1000]), (X[1000:], t[1000:])


def real_images(train: Batch, seed: int) -> Tensor:
    """One random training image a class."""
    order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(seed))
    return torch.stack([train[0][order][train[1][order] == label][0] for label in LABELS])


def distill(start: Tensor, train: Batch, steps: int) -> tuple[Tensor, float, float]:
    """Learned images, each step from the lower solution; the first hypergradient's error, its lower gradient's norm."""
    problem, x = Distillation(), {"images": start.clone()}
    y, method = problem.reset_lower(x), Implicit(CG(100, 1e-8), hvp=ReverseOverReverse(keep_graph=True))
    first = hypergradient(problem, x, y, method, upper_batch=train, lower_batches=[None], on_failure="raise")
    images = start.clone().requires_grad_()
    (exact,) = torch.autograd.grad(problem.upper_objective({}, solve(images, LABELS), train), images)
    upper = Level(x, torch.optim.Adam(x.values(), lr=0.03), [train])
    lower = Level(y, torch.optim.SGD(y.values()), [None])
    schedule = AlternatingSchedule(steps, lower_steps=0, upper_steps=1)
    Trainer(problem, upper, lower, schedule, method, on_failure="raise").run()
    return x["images"], float((first.grad["images"] - exact).norm() / exact.norm()), first.stationarity


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="30 steps instead of 150")
    steps = 30 if parser.parse_args(arguments).quick else 150
    train, test = load()

    def accuracy(images: Tensor, labels: Tensor = LABELS) -> float:
        predicted = scores(solve(images, labels), test[0]).argmax(dim=1)
        return 100.0 * float((predicted == test[1]).double().mean())

    random = [accuracy(real_images(train, seed)) for seed in range(20)]
    learned, error, gradient = distill(real_images(train, 0), train, steps)
    result = {
        "ten random images (mean of 20)": sum(random) / len(random),
        "ten class means": accuracy(torch.stack([train[0][train[1] == label].mean(dim=0) for label in LABELS])),
        "ten learned images": accuracy(learned),
        "all 1,000 images": accuracy(*train),
    }
    print("ridge classifier trained on     test accuracy")
    print("\n".join(f"{name:<32}{value:>12.1f}%" for name, value in result.items()))
    print(f"First hypergradient: relative error to autograd {error:.0e}; lower gradient {gradient:.0e}.")
    return {**result, "error": error, "lower_gradient": gradient}


if __name__ == "__main__":
    main()
