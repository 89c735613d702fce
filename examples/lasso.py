"""The weights of the Lasso and the elastic net, tuned by hypergradients and checked against a closed form.

    python examples/lasso.py [--quick]

Lower level: y = argmin 1/(2n) ||X y - t||^2 + sum_j exp(a_j) |y_j| + exp(b)/2 ||y||^2, solved by scikit-learn's Lasso.
Upper level: squared error on validation data, over one weight a, over a and b, or over an a_j for each feature. On the
support S the hypergradient is -exp(a_j) sign(y_j) u_j and -exp(b) y'u, with H_SS u = dF/dy. Data: scikit-learn's
diabetes set, its 10 measurements and their 45 products.
"""

import argparse

import numpy as np
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNetCV, Lasso
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from torch import Tensor

from bilevel import GMRES, AlternatingSchedule, Implicit, Level, Params, Trainer, hypergradient
from bilevel.lower import ElasticNet, ProximalMap, ProximalProblem

Batch = tuple[Tensor, Tensor]


def weights(x: Params) -> tuple[Tensor, Tensor]:
    """Of the L1 norm, and of the ridge, which is 0 where it is not tuned."""
    return x["a"].exp(), x["b"].exp() if "b" in x else torch.zeros_like(x["a"]).sum()


def fit(x: Params, batch: Batch) -> Tensor:
    """The elastic net as a Lasso of weight 1: features scaled by their weights, further rows for the ridge."""
    (X, t), (l1, ridge), (n, p) = batch, weights(x), batch[0].shape
    rows = torch.cat([X, (n * ridge).sqrt() * torch.eye(p)]) / l1
    lasso = Lasso(alpha=n / (n + p), fit_intercept=False, tol=1e-12, max_iter=10**6)
    return torch.from_numpy(lasso.fit(rows.numpy(), torch.cat([t, t.new_zeros(p)]).numpy()).coef_) / l1


class Sparse(ProximalProblem):
    def __init__(self, train: Batch) -> None:
        self.train, self.step_size = train, len(train[0]) / float(torch.linalg.matrix_norm(train[0], 2)) ** 2

    def lower_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        X, t = batch
        return 0.5 * (X @ lower["w"] - t).square().mean()

    upper_objective = lower_objective

    def proximal_map(self, upper: Params) -> ProximalMap:
        return ElasticNet(*weights(upper))

    def reset_lower(self, upper: Params) -> Params:
        return {"w": fit(upper, self.train)}


def closed_form(x: Params, w: Tensor, train: Batch, val: Batch) -> Params:
    """The hypergradient on paper, at the lower solution w."""
    (l1, ridge), S = weights(x), w != 0
    X, V = train[0][:, S], val[0][:, S]
    H = X.T @ X / len(X) + ridge * torch.eye(X.shape[1])
    u = torch.zeros_like(w).masked_scatter(S, torch.linalg.solve(H, V.T @ (V @ w[S] - val[1]) / len(V)))
    return {"a": -l1 * (w.sign() * u if l1.dim() else w.sign() @ u), "b": -ridge * (w @ u)}


def load(seed: int) -> list[Batch]:
    """Training, validation and test patients; standardised by the first two, and centred: there is no intercept."""
    X, t = load_diabetes(return_X_y=True, scaled=False)
    X, t = (part[np.random.default_rng(seed).permutation(len(t))] for part in (X, t))
    for step in (StandardScaler(), PolynomialFeatures(2, interaction_only=True, include_bias=False), StandardScaler()):
        X = np.asarray(step.fit(X[:300]).transform(X))
    X, t = torch.from_numpy(X), torch.from_numpy((t - t[:300].mean()) / t[:300].std())
    return [(X[a:b], t[a:b]) for a, b in ((0, 180), (180, 300), (300, len(t)))]


def tune(x: Params, train: Batch, val: Batch, steps: int) -> float:
    """Adam along hypergradients, each at the lower solution: their largest error, relative to the largest of them."""
    problem, method = Sparse(train), Implicit(GMRES(60, rtol=1e-13))
    y, errors, sizes = problem.reset_lower(x), [], []
    levels = Level(x, torch.optim.Adam(x.values(), lr=0.1), [val]), Level(y, torch.optim.SGD(y.values()), [train])
    trainer = Trainer(problem, *levels, AlternatingSchedule(steps, lower_steps=0, upper_steps=1), method)
    for _ in range(steps):
        y = problem.reset_lower(x)
        found = hypergradient(problem, x, y, method, upper_batch=val, lower_batches=[train]).grad
        exact = closed_form(x, y["w"], train, val)
        errors += [float((found[n] - exact[n]).norm()) for n in x]
        sizes += [float(exact[n].norm()) for n in x]
        trainer.advance()
    return max(errors) / max(sizes)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1 split of 10 steps instead of 5 of 30")
    splits, steps = (1, 10) if parser.parse_args(arguments).quick else (5, 30)
    rows, mismatch = {}, 0.0
    for train, val, (X, t) in (load(100 + seed) for seed in range(splits)):
        start, both = torch.tensor(-3.0).double(), (torch.cat([train[0], val[0]]), torch.cat([train[1], val[1]]))
        grid = ElasticNetCV(cv=5, fit_intercept=False, max_iter=10**5, eps=0.01)
        grid.set_params(l1_ratio=[0.1, 0.5, 0.9, 1.0])
        found = {"elastic net, cross-validated grid": torch.from_numpy(grid.fit(*(p.numpy() for p in both)).coef_)}
        for name, x in (
            ("Lasso, one weight", {"a": start.clone()}),
            ("elastic net, two weights", {"a": start.clone(), "b": start.clone()}),
            ("Lasso, a weight a feature", {"a": start.repeat(X.shape[1])}),
        ):
            mismatch = max(mismatch, tune(x, train, val, steps))
            found[name] = fit(x, both)
        for name, w in found.items():
            rows.setdefault(name, []).append((float((X @ w - t).square().mean()), float((w != 0).sum())))
    print("weights                             test error   features")
    result = {"mismatch": mismatch}
    for name, row in rows.items():
        result[name], count = np.mean(row, axis=0)
        print(f"{name:<36}{result[name]:>10.3f}{count:>11.1f}")
    print(f"{splits} splits; hypergradients differ from the closed form by {mismatch:.0e} at most.")
    return result


if __name__ == "__main__":
    main()
