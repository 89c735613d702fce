"""Data hyper-cleaning: one weight a training example, learned so that a clean validation set is classified well.

    python examples/hyper_cleaning.py [--quick]

Three in ten training labels are wrong. Lower level: logistic regression on the training set, example i weighted by
sigmoid(x_i). Upper level: the cross-entropy on 200 clean examples, over x. Data: scikit-learn's digits. A label is
called wrong if its weight ends below one half, where all weights start.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import cross_entropy

from bilevel import CG, AlternatingSchedule, Implicit, Level, Params, Problem, Trainer, hypergradient, ridge
from bilevel.products import ReverseOverReverse

Batch = tuple[Tensor, Tensor]
WRONG, RIDGE = 0.3, 0.003


class Cleaning(Problem):
    """The ridge is the lower level's regularizer: it keeps the system positive definite where weights go to 0."""

    regularization_weight = RIDGE

    def lower_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        X, t = batch
        return (upper["weight"].sigmoid() * cross_entropy(X @ lower["w"] + lower["b"], t, reduction="none")).mean()

    def upper_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        X, t = batch
        return cross_entropy(X @ lower["w"] + lower["b"], t)

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return ridge(lower)


def load() -> tuple[Batch, Batch, Batch, Tensor]:
    """800 training images with wrong labels among them, 200 clean ones, 797 test images; which labels are wrong."""
    generator = torch.Generator().manual_seed(100)
    X, t = map(torch.from_numpy, load_digits(return_X_y=True))
    order = torch.randperm(len(t), generator=generator)
    X, t = X[order].float() / 16, t[order]
    wrong = torch.rand(800, generator=generator) < WRONG
    shift = torch.randint(1, 10, (800,), generator=generator)
    noisy = torch.where(wrong, (t[:800] + shift) % 10, t[:800])
    return (X[:800], noisy), (X[800:1000], t[800:1000]), (X[1000:], t[1000:]), wrong


def learn(train: Batch, val: Batch, alternations: int) -> Trainer:
    """Alternates between 20 lower steps, which follow the moving weights, and one hypergradient step."""
    upper = {"weight": torch.zeros(len(train[1]), requires_grad=True)}
    lower = {"w": torch.zeros(64, 10, requires_grad=True), "b": torch.zeros(10, requires_grad=True)}
    trainer = Trainer(
        Cleaning(),
        Level(upper, torch.optim.Adam(upper.values(), lr=0.1), [val]),
        Level(lower, torch.optim.SGD(lower.values(), lr=1.0, momentum=0.9), [train]),
        AlternatingSchedule(alternations, lower_steps=20, upper_steps=1),
        Implicit(CG(40, rtol=1e-2), hvp=ReverseOverReverse(keep_graph=True)),
    )
    trainer.run()
    return trainer


def baseline(val: Batch, test: Batch, *parts: Batch) -> float:
    """Test accuracy of plain logistic regression on `parts`, with the ridge weight chosen on the validation images."""
    first, everything = parts[0], [torch.cat(tensors).numpy() for tensors in zip(*parts, strict=True)]
    models = [LogisticRegression(C=c, max_iter=2000) for c in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)]
    best = max(models, key=lambda model: model.fit(*first).score(*val))
    return 100.0 * float(best.fit(*everything).score(*test))


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="15 alternations instead of 100")
    train, val, test, wrong = load()
    trainer = learn(train, val, alternations=15 if parser.parse_args(arguments).quick else 100)
    X, t = test
    upper, lower = (trainer.levels[name].params for name in ("upper", "lower"))
    right = (X @ lower["w"] + lower["b"]).argmax(1) == t
    found = upper["weight"] < 0.0
    last = hypergradient(trainer.problem, upper, lower, CG(40, rtol=1e-2), upper_batch=val, lower_batches=[train])
    accuracies = {
        "all labels as they are": baseline(val, test, train),
        "all labels and the validation set": baseline(val, test, train, val),
        "learned weights": 100.0 * float(right.double().mean()),
        "wrong labels left out (an oracle)": baseline(val, test, (train[0][~wrong], train[1][~wrong])),
    }
    result = {
        **accuracies,
        "recall": float((found & wrong).sum() / wrong.sum()),
        "precision": float((found & wrong).sum() / found.sum()),
        "stationarity": last.stationarity,
        "failed_solves": float(trainer.failures.total()),
    }
    print("trained on                          test accuracy")
    print("\n".join(f"{name:<36}{value:>12.1f}%" for name, value in accuracies.items()))
    found_share = f"{result['recall']:.0%} of {int(wrong.sum())} wrong labels were found"
    print(f"{found_share}; of {int(found.sum())} labels called wrong, {result['precision']:.0%} are.")
    print(f"Norm of the lower gradient {last.stationarity:.0e}; {trainer.failures.total()} failed solves.")
    return result


if __name__ == "__main__":
    main()
