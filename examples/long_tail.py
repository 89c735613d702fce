"""Class weights for a long-tailed training set, learned on a small balanced validation set.

    python examples/long_tail.py [--quick]

The most frequent class has 100 training images, the rarest 4. Lower level: logistic regression in which an image of
class c weighs exp(x_c). Upper level: the cross-entropy on 10 validation images a class, over x. Weights start at
inverse frequencies; their common scale, in effect the ridge weight, is chosen on validation images in every row. The
last row uses those images for training as well. Data: scikit-learn's digits.
"""

import argparse

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import cross_entropy

from bilevel import CG, AlternatingSchedule, Implicit, Level, Params, Problem, Trainer, linearize
from bilevel.products import ReverseOverReverse

Batch = tuple[Tensor, Tensor]


class LongTail(Problem):
    # The weight of the ridge is fixed: the common scale of the class weights has the same effect.
    regularization_weight = 1e-3

    def __init__(self, train: Batch) -> None:
        self.train = train

    def lower_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        X, t = batch
        losses = cross_entropy(X @ lower["w"] + lower["b"], t, reduction="none")
        return (upper["log_weight"].exp()[t] * losses).mean()

    def upper_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        return cross_entropy(batch[0] @ lower["w"] + lower["b"], batch[1])

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return 0.5 * lower["w"].square().sum()

    def reset_lower(self, upper: Params) -> Params:
        return solve(upper["log_weight"], self.train)


def load(seed: int) -> list[Batch]:
    """Training set with 100 * 25^(-rank/9) images of a class, balanced validation set, test set."""
    generator = torch.Generator().manual_seed(seed)
    X, t = map(torch.from_numpy, load_digits(return_X_y=True))
    rank, order = torch.randperm(10, generator=generator), torch.randperm(len(t), generator=generator)
    X, t = X[order] / 16, t[order]
    groups = [(t == c).nonzero().flatten() for c in range(10)]
    train = torch.cat([group[: round(100 * 25 ** (-int(rank[c]) / 9))] for c, group in enumerate(groups)])
    val, test = (torch.cat([group[part] for group in groups]) for part in (slice(100, 110), slice(110, None)))
    return [(X[part], t[part]) for part in (train, val, test)]


def solve(log_weight: Tensor, batch: Batch) -> Params:
    """The lower solution by scikit-learn: an implicit hypergradient does not ask how it was found."""
    X, t = batch
    model = LogisticRegression(C=1.0 / (len(t) * LongTail.regularization_weight), tol=1e-6, max_iter=5000)
    model.fit(X.numpy(), t.numpy(), sample_weight=log_weight.detach().exp()[t].numpy())
    return {"w": torch.tensor(model.coef_.T), "b": torch.tensor(model.intercept_)}


def balanced_accuracy(lower: Params, batch: Batch) -> float:
    """Mean over classes of the share of a class that is recognised, in percent."""
    right = ((batch[0] @ lower["w"] + lower["b"]).argmax(1) == batch[1]).double()
    return 100.0 * float(torch.stack([right[batch[1] == c].mean() for c in range(10)]).mean())


def chosen(log_weight: Tensor, train: Batch, val: Batch) -> Tensor:
    """`log_weight` plus the common scale, in effect the ridge weight, that has the least validation loss."""
    candidates = [log_weight + scale for scale in (-1.0, 0.0, 1.0, 2.0, 3.0)]
    return min(candidates, key=lambda x: float(LongTail(train).upper_objective({}, solve(x, train), val)))


def learn(start: Tensor, train: Batch, val: Batch, steps: int) -> tuple[Tensor, float]:
    """The learned log-weights, and the norm of the lower gradient there."""
    problem, x, y = LongTail(train), {"log_weight": start.clone()}, solve(start, train)
    upper, lower = Level(x, torch.optim.Adam(x.values(), lr=0.1), [val]), Level(y, torch.optim.SGD(y.values()), [train])
    # No lower steps: each alternation begins at the lower solution.
    schedule = AlternatingSchedule(steps, lower_steps=0, upper_steps=1)
    method = Implicit(CG(200, 1e-3), hvp=ReverseOverReverse(keep_graph=True))
    Trainer(problem, upper, lower, schedule, method, on_failure="raise").run()
    return x["log_weight"], linearize(problem, x, solve(x["log_weight"], train), [train]).stationarity()


def compare(seed: int, steps: int) -> dict[str, float]:
    train, val, test = load(seed)
    both = torch.cat([train[0], val[0]]), torch.cat([train[1], val[1]])
    counts, all_counts = torch.bincount(train[1]).double(), torch.bincount(both[1]).double()
    inverse = chosen(-counts.log() + counts.log().mean(), train, val)
    learned, gradient = learn(inverse, train, val, steps)
    return {
        "unweighted": balanced_accuracy(solve(chosen(torch.zeros_like(counts), train, val), train), test),
        "inverse_frequency": balanced_accuracy(solve(inverse, train), test),
        "learned": balanced_accuracy(solve(learned, train), test),
        "inverse_frequency_on_both_sets": balanced_accuracy(solve(inverse + (counts / all_counts).log(), both), test),
        "lower_gradient": gradient,
    }


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1 split of 5 steps instead of 4 of 12")
    splits, steps = (1, 5) if parser.parse_args(arguments).quick else (4, 12)
    runs = [compare(100 + seed, steps) for seed in range(splits)]
    result = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
    print("weights                         balanced test accuracy")
    print("\n".join(f"{name.replace('_', ' '):<32}{result[name]:>21.1f}%" for name in list(result)[:4]))
    gains = ", ".join(f"{run['learned'] - run['inverse_frequency']:+.1f}" for run in runs)
    print(f"Learned less inverse frequency, by split: {gains}; lower gradient {result['lower_gradient']:.0e}.")
    return result


if __name__ == "__main__":
    main()
