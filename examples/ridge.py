"""Ridge regression with one regularization weight a feature, tuned by hypergradients and checked against a closed form.

    python examples/ridge.py [--quick]

Lower level: y = argmin 1/(2n) ||X y - t||^2 + 1/2 sum_j exp(x_j) y_j^2 on training data. Upper level: squared error on
validation data, over x. The lower solution and the hypergradient -exp(x_j) y_j [H^-1 v]_j have closed forms, so every
number can be checked. Data: scikit-learn's diabetes set, its 10 measurements, their squares and products.
"""

import argparse

import numpy as np
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import PolynomialFeatures
from torch import Tensor

from bilevel import CG, AlternatingSchedule, Implicit, Level, Params, Problem, Trainer, hypergradient
from bilevel.products import ReverseOverReverse

Batch = tuple[Tensor, Tensor]


class Ridge(Problem):
    """Squared error below and above; the penalty stands in the lower objective, because its weights are tuned."""

    def __init__(self, train: Batch) -> None:
        self.train = train

    def lower_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        X, t = batch
        penalty = (upper["log_weight"].exp() * lower["w"].square()).sum()
        return 0.5 * (X @ lower["w"] - t).square().mean() + 0.5 * penalty

    def upper_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        X, t = batch
        return 0.5 * (X @ lower["w"] - t).square().mean()

    def reset_lower(self, upper: Params) -> Params:
        """The lower solution, exactly."""
        X, t = self.train
        return {"w": torch.linalg.solve(hessian(upper["log_weight"], self.train), X.T @ t / len(X))}


def hessian(log_weight: Tensor, batch: Batch) -> Tensor:
    """H = X'X/n + diag(exp x)."""
    return batch[0].T @ batch[0] / len(batch[0]) + torch.diag(log_weight.exp())


def closed_form(log_weight: Tensor, w: Tensor, train: Batch, val: Batch) -> Tensor:
    """The hypergradient on paper, at the lower solution w."""
    v = val[0].T @ (val[0] @ w - val[1]) / len(val[0])
    return -log_weight.exp() * w * torch.linalg.solve(hessian(log_weight, train), v)


def load(seed: int) -> list[Batch]:
    """Train, validation and test parts; standardised, and centred so that no intercept is needed, by the train part."""
    measurements, progression = load_diabetes(return_X_y=True, scaled=False)
    order = np.random.default_rng(seed).permutation(len(progression))
    X = PolynomialFeatures(2, include_bias=False).fit_transform(measurements[order])
    X, t = torch.from_numpy(X), torch.from_numpy(progression[order])
    X, t = (X - X[:180].mean(0)) / X[:180].std(0), (t - t[:180].mean()) / t[:180].std()
    return [(X[a:b], t[a:b]) for a, b in ((0, 180), (180, 300), (300, len(t)))]


def tune(seed: int, steps: int) -> dict[str, float]:
    """One split: tuned weights against one cross-validated weight."""

    def error(w: Tensor, batch: Batch) -> float:
        return float((batch[0] @ w - batch[1]).square().mean())

    train, val, test = load(seed)
    both = torch.cat([train[0], val[0]]), torch.cat([train[1], val[1]])
    problem, x = Ridge(train), {"log_weight": torch.full((train[0].shape[1],), -2.0, dtype=torch.float64)}
    y = problem.reset_lower(x)
    upper = Level(x, torch.optim.Adam(x.values(), lr=0.1), [val])
    lower = Level(y, torch.optim.SGD(y.values()), [train])
    # No lower steps: each alternation begins at the lower solution. A kept graph makes products on small data cheaper.
    schedule = AlternatingSchedule(steps, lower_steps=0, upper_steps=1)
    method = Implicit(CG(200, 1e-10), hvp=ReverseOverReverse(keep_graph=True))
    trainer = Trainer(problem, upper, lower, schedule, method, on_failure="raise")
    before, mismatch, stationarity = error(y["w"], val), 0.0, 0.0
    for _ in range(steps):
        # What the next alternation goes along.
        solution = problem.reset_lower(x)
        result = hypergradient(problem, x, solution, method, upper_batch=val, lower_batches=[train])
        exact = closed_form(x["log_weight"], solution["w"], train, val)
        mismatch = max(mismatch, float((result.grad["log_weight"] - exact).norm() / exact.norm()))
        stationarity = max(stationarity, result.stationarity)
        trainer.advance()
    # RidgeCV's alpha stands beside a sum of squares, exp(x) beside their mean: alpha = n exp(x).
    alphas = len(both[0]) * np.logspace(-5, 2, 29)
    single = RidgeCV(alphas=alphas, fit_intercept=False, cv=5).fit(both[0].numpy(), both[1].numpy())
    return {
        "largest_error_of_hypergradients": mismatch,
        "largest_lower_gradient": stationarity,
        "validation_error_before_tuning": before,
        "validation_error_after_tuning": error(problem.reset_lower(x)["w"], val),
        "test_error_weight_per_feature": error(Ridge(both).reset_lower(x)["w"], test),
        "test_error_single_weight_by_cv": error(torch.from_numpy(single.coef_), test),
    }


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 splits of 15 steps instead of 10 of 40")
    splits, steps = (2, 15) if parser.parse_args(arguments).quick else (10, 40)
    runs = [tune(100 + seed, steps) for seed in range(splits)]
    result = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
    result |= {name: max(run[name] for run in runs) for name in result if name.startswith("largest")}
    print("\n".join(f"{name.replace('_', ' '):<34}{value:>9.3g}" for name, value in result.items()))
    differences = [run["test_error_weight_per_feature"] - run["test_error_single_weight_by_cv"] for run in runs]
    spread = f"{np.mean(differences):+.3f} +- {np.std(differences, ddof=1) / splits**0.5:.3f}"
    print(f"Over {splits} splits, {steps} hypergradients each, the two test errors differ by {spread}.")
    return result


if __name__ == "__main__":
    main()
