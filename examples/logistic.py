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

from bilevel import AlternatingSchedule, Implicit, Level, Params, Problem, Trainer, hypergradient
from bilevel.linear import CG, MINRES, Dense, Identity, Neumann, Solver
from bilevel.products import ReverseOverReverse

Batch = tuple[Tensor, Tensor]
# Log-weights that regularize weakly and equally; a kept graph makes products on small data several times cheaper.
START, HVP = torch.full((30,), -4.0, dtype=torch.float64), ReverseOverReverse(keep_graph=True)
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
    def __init__(self, train: Batch) -> None:
        self.train = train

    def lower_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        penalty = (upper["log_weight"].exp() * lower["w"].square()).sum()
        return self.upper_objective(upper, lower, batch) + 0.5 * penalty

    def upper_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        X, t = batch
        return binary_cross_entropy_with_logits(X @ lower["w"] + lower["b"], t)

    def reset_lower(self, upper: Params) -> Params:
        """The lower solution to rounding, by Newton steps of limited length on (w, b) as one vector."""
        X, t = torch.cat([self.train[0], torch.ones_like(self.train[1])[:, None]], dim=1), self.train[1]
        weight = torch.cat([upper["log_weight"].exp(), torch.zeros(1, dtype=X.dtype)])
        y = torch.zeros_like(weight)
        for _ in range(50):
            p = torch.sigmoid(X @ y)
            hessian = X.T @ ((p * (1 - p))[:, None] * X) / len(X) + torch.diag(weight)
            step = torch.linalg.solve(hessian, X.T @ (p - t) / len(X) + weight * y)
            y = y - step / max(1.0, float(step.norm()) / 5.0)
            if step.norm() < 1e-12:
                break
        return {"w": y[:-1], "b": y[-1]}


def load() -> list[Batch]:
    """150 training, 150 validation and 269 test patients, standardised by the training part."""
    X, t = map(torch.from_numpy, load_breast_cancer(return_X_y=True))
    order = torch.randperm(len(t), generator=torch.Generator().manual_seed(0))
    X, t = X[order], t[order].to(X.dtype)
    X = (X - X[:150].mean(0)) / X[:150].std(0)
    return [(X[a:b], t[a:b]) for a, b in ((0, 150), (150, 300), (300, len(t)))]


def tune(problem: Logistic, val: Batch, solver: Solver, steps: int) -> tuple[Params, Params]:
    """Both levels' variables after some steps of Adam; no lower steps: each alternation begins at the solution."""
    x = {"log_weight": START.clone()}
    y = problem.reset_lower(x)
    upper = Level(x, torch.optim.Adam(x.values(), lr=0.1), [val])
    lower = Level(y, torch.optim.SGD(y.values()), [problem.train])
    schedule = AlternatingSchedule(steps, lower_steps=0, upper_steps=1)
    Trainer(problem, upper, lower, schedule, Implicit(solver, hvp=HVP)).run()
    return x, problem.reset_lower(x)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="5 steps of tuning instead of 40")
    steps = 5 if parser.parse_args(arguments).quick else 40
    train, val, test = load()
    problem, results = Logistic(train), {}
    x, y = {"log_weight": START}, problem.reset_lower({"log_weight": START})
    first = {
        name: hypergradient(problem, x, y, Implicit(solver, hvp=HVP), upper_batch=val, lower_batches=[train])
        for name, solver in SOLVERS.items()
    }
    truth = first["Dense"]
    print("                hypergradient before tuning              after tuning")
    print("solver          error    cosine  products  status        validation  test loss  test accuracy")
    for name, solver in SOLVERS.items():
        tuned, solution = tune(problem, val, solver, steps)
        g, exact, s = first[name].grad["log_weight"], truth.grad["log_weight"], first[name].solution
        assert s is not None
        right = (test[0] @ solution["w"] + solution["b"] > 0) == (test[1] > 0)
        results[name] = row = {
            "error": float((g - exact).norm() / exact.norm()),
            "cosine": float(cosine_similarity(g, exact, dim=0)),
            "products": s.num_hvps,
            "validation": float(problem.upper_objective(tuned, solution, val)),
            "test_loss": float(problem.upper_objective(tuned, solution, test)),
            "test_accuracy": 100.0 * float(right.double().mean()),
        }
        print(f"{name:<14}{row['error']:>7.1e}{row['cosine']:>10.4f}{s.num_hvps:>10}  {s.status.name:<12}", end="")
        print(f"{row['validation']:>12.4f}{row['test_loss']:>11.4f}{row['test_accuracy']:>14.1f}%")
    right = [round(row["test_accuracy"] * len(test[1]) / 100) for row in results.values()]
    print(f"Validation loss {truth.loss:.4f} before tuning; {steps} steps; lower gradient {truth.stationarity:.0e}.")
    print(f"After tuning, the solvers differ by {max(right) - min(right)} of {len(test[1])} test patients at most.")
    return results


if __name__ == "__main__":
    main()
