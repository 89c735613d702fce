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

from bilevel import CG, Params, Problem, hypergradient
from bilevel.products import ReverseOverReverse

Batch = tuple[Tensor, Tensor]


class Ridge(Problem):
    """Squared error below and above; the penalty stands in the lower objective, because its weights are tuned."""

    def lower_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        X, t = batch
        penalty = (upper["log_weight"].exp() * lower["w"].square()).sum()
        return 0.5 * (X @ lower["w"] - t).square().mean() + 0.5 * penalty

    def upper_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        X, t = batch
        return 0.5 * (X @ lower["w"] - t).square().mean()


def hessian(log_weight: Tensor, batch: Batch) -> Tensor:
    """H = X'X/n + diag(exp x)."""
    return batch[0].T @ batch[0] / len(batch[0]) + torch.diag(log_weight.detach().exp())


def solve(log_weight: Tensor, batch: Batch) -> Tensor:
    """The lower solution, exactly."""
    X, t = batch
    return torch.linalg.solve(hessian(log_weight, batch), X.T @ t / len(X))


def closed_form(log_weight: Tensor, train: Batch, val: Batch) -> Tensor:
    """The hypergradient on paper."""
    X, t = val
    w = solve(log_weight, train)
    v = X.T @ (X @ w - t) / len(X)
    return -log_weight.detach().exp() * w * torch.linalg.solve(hessian(log_weight, train), v)


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
    x = {"log_weight": torch.full((train[0].shape[1],), -2.0, dtype=torch.float64, requires_grad=True)}
    optimizer = torch.optim.Adam(x.values(), lr=0.1)
    mismatch = stationarity = 0.0
    start = solve(x["log_weight"], train)
    for _ in range(steps):
        y = {"w": solve(x["log_weight"], train)}
        # A kept graph makes products on small data several times cheaper; a solve that fails is an error here.
        options = {"solver": CG(200, 1e-10), "hvp": ReverseOverReverse(keep_graph=True), "on_failure": "raise"}
        result = hypergradient(Ridge(), x, y, upper_batch=val, lower_batches=[train], **options)
        exact = closed_form(x["log_weight"], train, val)
        mismatch = max(mismatch, float((result.grad["log_weight"] - exact).norm() / exact.norm()))
        stationarity = max(stationarity, result.stationarity)
        x["log_weight"].grad = result.grad["log_weight"]
        optimizer.step()
    # RidgeCV's alpha stands beside a sum of squares, exp(x) beside their mean: alpha = n exp(x).
    alphas = len(both[0]) * np.logspace(-5, 2, 29)
    single = RidgeCV(alphas=alphas, fit_intercept=False, cv=5).fit(both[0].numpy(), both[1].numpy())
    return {
        "largest_error_of_hypergradients": mismatch,
        "largest_lower_gradient": stationarity,
        "validation_error_before_tuning": error(start, val),
        "validation_error_after_tuning": error(solve(x["log_weight"], train), val),
        "test_error_weight_per_feature": error(solve(x["log_weight"], both), test),
        "test_error_single_weight_by_cv": error(torch.from_numpy(single.coef_), test),
    }


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 splits of 15 steps instead of 10 of 40")
    splits, steps = (2, 15) if parser.parse_args(arguments).quick else (10, 40)
    runs = [tune(100 + seed, steps) for seed in range(splits)]
    result = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
    result |= {name: max(run[name] for run in runs) for name in result if name.startswith("largest")}
    for name, value in result.items():
        print(f"{name.replace('_', ' '):<34}{value:>9.3g}")
    difference = np.array(
        [run["test_error_weight_per_feature"] - run["test_error_single_weight_by_cv"] for run in runs]
    )
    spread = f"{difference.mean():+.3f} +- {difference.std(ddof=1) / splits**0.5:.3f}"
    print(f"Over {splits} splits, {steps} hypergradients each, the two test errors differ by {spread}.")
    return result


if __name__ == "__main__":
    main()
