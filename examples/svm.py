"""A support vector machine with a width for each feature, tuned by hypergradients through its dual.

    python examples/svm.py [--quick]

Lower level: y = argmin 1/2 y'(Q + I/C)y - sum(y) over y >= 0, with Q_ij = t_i t_j (k(u_i, u_j) + 1): the dual of a
support vector machine with squared hinge losses, whose bias is in the kernel k(u, v) = exp(-sum_f w_f (u_f - v_f)^2).
SciPy solves it, as non-negative least squares. Upper level: the logistic loss of the scores on validation data, over C
and the widths w. The rival is a grid over C and one width. Data: scikit-learn's breast cancer set, 30 features.
"""

import argparse
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from sklearn.datasets import load_breast_cancer
from torch import Tensor
from torch.nn.functional import softplus

from bilevel import GMRES, AlternatingSchedule, Implicit, Level, Params, Trainer, hypergradient
from bilevel.lower import NonNegative, ProximalMap, ProximalProblem

Batch = tuple[Tensor, Tensor]


def kernel(x: Params, U: Tensor, V: Tensor) -> Tensor:
    w = x["log_width"].exp().expand(U.shape[1])
    distances = (U.square() @ w)[:, None] + V.square() @ w - 2.0 * (U * w) @ V.T
    return (-distances).exp() + 1.0


class Machine(ProximalProblem):
    def __init__(self, train: Batch) -> None:
        self.train, self.step_size = train, 1.0 / (2 * len(train[1]))

    def quadratic(self, upper: Params) -> Tensor:
        U, t = self.train
        return t[:, None] * t * kernel(upper, U, U) + torch.eye(len(t)) / upper["log_C"].exp()

    def lower_objective(self, upper: Params, lower: Params, batch: None) -> Tensor:
        return 0.5 * lower["y"] @ self.quadratic(upper) @ lower["y"] - lower["y"].sum()

    def proximal_map(self, upper: Params) -> ProximalMap:
        return NonNegative()

    def scores(self, upper: Params, lower: Params, U: Tensor) -> Tensor:
        return kernel(upper, U, self.train[0]) @ (self.train[1] * lower["y"])

    def upper_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        return softplus(-batch[1] * self.scores(upper, lower, batch[0])).mean()

    def reset_lower(self, upper: Params) -> Params:
        """The solution by SciPy: ||R y - R^-T 1||^2 with Q + I/C = R'R."""
        R = torch.linalg.cholesky(self.quadratic(upper), upper=True)
        right = torch.linalg.solve_triangular(R.T, torch.ones_like(R[:, :1]), upper=False)[:, 0]
        return {"y": torch.from_numpy(nnls(R.numpy(), right.numpy(), maxiter=10**4)[0])}

    def judged(self, x: Params, batch: Batch) -> tuple[float, float]:
        """Loss and accuracy."""
        y = self.reset_lower(x)
        right = self.scores(x, y, batch[0]) * batch[1] > 0.0
        return float(self.upper_objective(x, y, batch)), 100.0 * float(right.double().mean())


def load(seed: int) -> list[Batch]:
    """Training, validation and test patients, standardised by the first two."""
    U, t = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(t))
    U, t = torch.from_numpy(U[order]), torch.from_numpy(2.0 * t[order] - 1.0)
    U = (U - U[:240].mean(0)) / U[:240].std(0)
    return [(U[a:b], t[a:b]) for a, b in ((0, 120), (120, 240), (240, len(t)))]


def tune(machine: Machine, x: Params, val: Batch, steps: int) -> tuple[int, float]:
    """Adam along hypergradients, each at the lower solution: how many failed, the largest ||y - T(x, y)||."""
    y = machine.reset_lower(x)
    levels = Level(x, torch.optim.Adam(x.values(), lr=0.2), [val]), Level(y, torch.optim.SGD(y.values()), [None])
    schedule = AlternatingSchedule(steps, lower_steps=0, upper_steps=1)
    trainer = Trainer(machine, *levels, schedule, Implicit(GMRES(120, rtol=1e-8)))
    trainer.run()
    last = hypergradient(machine, x, machine.reset_lower(x), GMRES(120), upper_batch=val, lower_batches=[None])
    return trainer.failures.total(), last.stationarity


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1 split of 30 steps instead of 4 of 40")
    splits, steps = (1, 30) if parser.parse_args(arguments).quick else (4, 40)
    rows, failures, stationarity = {}, 0, 0.0
    for train, val, test in (load(100 + seed) for seed in range(splits)):
        machine = Machine(train)
        steps_of_8 = torch.arange(8, dtype=torch.float64)
        grid = [{"log_C": c, "log_width": w - 8.0} for c in steps_of_8 for w in steps_of_8]
        one = {"log_C": torch.tensor(0.0).double(), "log_width": torch.tensor(-4.0).double()}
        each = {"log_C": one["log_C"].clone(), "log_width": one["log_width"].repeat(30)}
        for x in (one, each):
            failed, residual = tune(machine, x, val, steps)
            failures, stationarity = failures + failed, max(stationarity, residual)
        best = min(grid, key=lambda x: machine.judged(x, val)[0])
        for name, x in (("grid of 64, C and one width", best), ("C and one width", one), ("C and 30 widths", each)):
            rows.setdefault(name, []).append((machine.judged(x, val)[0], *machine.judged(x, test)))
    print("tuned                          validation loss   test loss   test accuracy")
    result = {}
    for name, row in rows.items():
        result[name] = np.mean(row, axis=0).tolist()
        print(f"{name:<31}{result[name][0]:>15.3f}{result[name][1]:>12.3f}{result[name][2]:>15.1f}%")
    print(
        f"{splits} splits of {2 * steps} hypergradients, {failures} of them failed; last ||y - T|| {stationarity:.0e}."
    )
    return result | {"failures": failures, "stationarity": stationarity}


if __name__ == "__main__":
    main()
