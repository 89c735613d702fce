"""Logistic regression with one regularization weight a feature: what is each solver's error, and what does it cost?

    python examples/logistic.py [--quick]

Lower level: y = argmin cross-entropy + 1/2 sum_j exp(x_j) y_j^2 on training data, by Newton's method. Upper level: the
cross-entropy on validation data, over x. `Dense` is the truth: the table gives each solver's error in the first
hypergradient, its products with the Hessian, and where tuning with it ends. Data: scikit-learn's breast-cancer set.
"""

import argparse

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cosine_similarity

import bilevel
from bilevel import CG, MINRES, Identity, Implicit, Neumann, Params, Problem, hypergradient
from bilevel.linear import Dense, Solver
from bilevel.products import ReverseOverReverse

Batch = tuple[Tensor, Tensor]

SOLVERS: dict[str, Solver] = {
    "Dense": Dense(),
    "CG(3)": CG(3, rtol=None),
    "CG(10)": CG(10, rtol=None),
    "CG, rtol 1e-6": CG(100, rtol=1e-6),
    "MINRES(10)": MINRES(10, rtol=None),
    "Neumann(10)": Neumann(10),
    "Neumann(100)": Neumann(100),
    "Identity": Identity(),
}


class Logistic(Problem):
    def lower_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        penalty = (upper["log_weight"].exp() * lower["w"].square()).sum()
        return self.upper_objective(upper, lower, batch) + 0.5 * penalty

    def upper_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        X, t = batch
        return binary_cross_entropy_with_logits(X @ lower["w"] + lower["b"], t)


def load() -> list[Batch]:
    """150 training, 150 validation and 269 test patients, standardised by the training part."""
    X, t = map(torch.from_numpy, load_breast_cancer(return_X_y=True))
    order = torch.randperm(len(t), generator=torch.Generator().manual_seed(0))
    X, t = X[order], t[order].to(X.dtype)
    X = (X - X[:150].mean(0)) / X[:150].std(0)
    return [(X[a:b], t[a:b]) for a, b in ((0, 150), (150, 300), (300, len(t)))]


def newton(upper: Params, batch: Batch) -> Params:
    """The lower solution to rounding, by Newton steps of limited length on (w, b) as one vector."""
    X = torch.cat([batch[0], torch.ones_like(batch[1])[:, None]], dim=1)
    weight = torch.cat([upper["log_weight"].detach().exp(), torch.zeros(1, dtype=X.dtype)])
    y = torch.zeros_like(weight)
    for _ in range(50):
        p = torch.sigmoid(X @ y)
        hessian = X.T @ ((p * (1 - p))[:, None] * X) / len(X) + torch.diag(weight)
        step = torch.linalg.solve(hessian, X.T @ (p - batch[1]) / len(X) + weight * y)
        y = y - step / max(1.0, float(step.norm()) / 5.0)
        if step.norm() < 1e-12:
            break
    return {"w": y[:-1], "b": y[-1]}


def one(upper: Params, lower: Params, data: list[Batch], solver: Solver) -> bilevel.Hypergradient:
    """One hypergradient; a kept graph makes products on small data several times cheaper."""
    hvp = ReverseOverReverse(keep_graph=True)
    return hypergradient(
        Logistic(), upper, lower, Implicit(solver, hvp=hvp), upper_batch=data[1], lower_batches=[data[0]]
    )


def tune(solver: Solver, steps: int, data: list[Batch]) -> tuple[Params, Params]:
    """Both levels' variables after some steps of Adam with this solver, from weak and equal regularization."""
    upper = {"log_weight": torch.full((30,), -4.0, dtype=torch.float64, requires_grad=True)}
    optimizer = torch.optim.Adam(upper.values(), lr=0.1)
    for _ in range(steps):
        upper["log_weight"].grad = one(upper, newton(upper, data[0]), data, solver).grad["log_weight"]
        optimizer.step()
    return upper, newton(upper, data[0])


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="5 steps of tuning instead of 40")
    steps = 5 if parser.parse_args(arguments).quick else 40
    data = load()
    upper, lower = tune(Identity(), 0, data)
    truth = one(upper, lower, data, Dense())
    results = {}
    print("                hypergradient before tuning              after tuning")
    print("solver          error    cosine  products  status        validation  test loss  test accuracy")
    for name, solver in SOLVERS.items():
        first = one(upper, lower, data, solver)
        tuned, solution = tune(solver, steps, data)
        g, exact, s = first.grad["log_weight"], truth.grad["log_weight"], first.solution
        assert s is not None
        right = (data[2][0] @ solution["w"] + solution["b"] > 0) == (data[2][1] > 0)
        results[name] = row = {
            "error": float((g - exact).norm() / exact.norm()),
            "cosine": float(cosine_similarity(g, exact, dim=0)),
            "products": s.num_hvps,
            "validation": float(Logistic().upper_objective(tuned, solution, data[1])),
            "test_loss": float(Logistic().upper_objective(tuned, solution, data[2])),
            "test_accuracy": 100.0 * float(right.double().mean()),
        }
        print(f"{name:<14}{row['error']:>7.1e}{row['cosine']:>10.4f}{s.num_hvps:>10}  {s.status.name:<12}", end="")
        print(f"{row['validation']:>12.4f}{row['test_loss']:>11.4f}{row['test_accuracy']:>14.1f}%")
    right = [round(row["test_accuracy"] * len(data[2][1]) / 100) for row in results.values()]
    print(f"Validation loss {truth.loss:.4f} before tuning; {steps} steps; lower gradient {truth.stationarity:.0e}.")
    print(f"After tuning, the solvers differ by {max(right) - min(right)} of {len(data[2][1])} test patients at most.")
    return results


if __name__ == "__main__":
    main()
