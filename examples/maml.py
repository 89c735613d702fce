"""MAML in a plain torch loop: the solutions of few-shot tasks are a layer, below a loss and an optimizer of one's own.

    python examples/maml.py [--quick]

A task is a sine of unknown amplitude (0.1 to 5) and phase (0 to pi), to be learned from 10 points (Finn et al. 2017).
Lower level: y_i = argmin of the error on the points + lambda/2 ||y - x||^2 (iMAML: Rajeswaran et al. 2019), for 8 tasks
at once, solved by L-BFGS. Upper level: the error of the y_i on other points. The rival is joint training.
"""

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bilevel import CG, Params, Problem, proximal
from bilevel.hypergradients import AdjointSolve, lower_solution

Batch = tuple[Tensor, Tensor]
POINTS, TASKS, HIDDEN = 10, 8, 40


def network(p: Params, X: Tensor) -> Tensor:
    """One network a task: every tensor has a leading dimension of tasks."""
    return ((X / 2.5 @ p["w1"] + p["b1"]).tanh() @ p["w2"] + p["b2"]).tanh() @ p["w3"] + p["b3"]


def errors(p: Params, batch: Batch) -> Tensor:
    """The mean squared error of each task."""
    return (network(p, batch[0]) - batch[1]).square().mean(dim=(1, 2))


def random_start() -> Params:
    generator = torch.Generator().manual_seed(0)
    start: Params = {}
    for k, (n, m) in enumerate([(1, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 1)], start=1):
        weight = torch.randn(1, n, m, generator=generator) / math.sqrt(n)
        start |= {f"w{k}": weight, f"b{k}": torch.zeros(1, 1, m)}
    return start


def draw(generator: torch.Generator, count: int) -> tuple[Batch, Batch]:
    """Points to learn from and as many others of `count` tasks, [tasks, points, 1]."""
    amplitude, phase = torch.rand(2, count, 1, 1, generator=generator)
    X = 10.0 * torch.rand(count, 2 * POINTS, 1, generator=generator) - 5.0
    t = (0.1 + 4.9 * amplitude) * torch.sin(X - math.pi * phase)
    return (X[:, :POINTS], t[:, :POINTS]), (X[:, POINTS:], t[:, POINTS:])


class Adapted(Problem):
    """The sum over tasks, so that each solves a problem of its own."""

    def __init__(self, weight: float) -> None:
        self.regularization_weight = weight

    def lower_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        return errors(lower, batch).sum()

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return proximal({name: upper[name].expand_as(leaf) for name, leaf in lower.items()}, lower)


def adapt(problem: Adapted, start: Params, support: Batch) -> Params:
    """The lower level, solved from the start on; no graph leads through it."""
    x = {name: leaf.detach() for name, leaf in start.items()}
    y = {name: leaf.repeat(len(support[0]), 1, 1).requires_grad_() for name, leaf in x.items()}
    optimizer = torch.optim.LBFGS(y.values(), max_iter=60, history_size=20, line_search_fn="strong_wolfe")

    def value() -> Tensor:
        optimizer.zero_grad()
        total = problem.lower_objective(x, y, support) + problem.regularization_weight * problem.regularizer(x, y)
        total.backward()
        return total

    optimizer.step(value)
    return y


def trained(steps: int, loss_of: Callable[[Params, Batch, Batch], Tensor]) -> Params:
    """A start, by a loop as for any network."""
    x: Params = {name: nn.Parameter(leaf) for name, leaf in random_start().items()}
    optimizer, generator = torch.optim.Adam(x.values(), lr=0.005), torch.Generator().manual_seed(1)
    for _ in range(steps):
        loss = loss_of(x, *draw(generator, TASKS))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(x.values(), 10.0)
        optimizer.step()
    return x


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="10 meta-steps instead of 100")
    steps = 10 if parser.parse_args(arguments).quick else 100
    strong, weak, records = Adapted(1.0), Adapted(0.03), list[list[AdjointSolve]]()

    def after_adaptation(x: Params, support: Batch, query: Batch) -> Tensor:
        y = lower_solution(strong, x, adapt(strong, x, support), [support], CG(30, rtol=0.1), on_failure="ignore")
        records.append(y.record)
        return errors(y, query).mean()

    joint = trained(10 * steps, lambda x, support, query: (errors(x, support) + errors(x, query)).mean())
    maml = trained(steps, after_adaptation)
    support, query = draw(torch.Generator().manual_seed(10**6), 150)
    failed = sum(not solve.solution.status.ok for record in records for solve in record)
    result: dict[str, float] = {"failed_solves": failed}
    print("start      lambda = 1       lambda = 0.03   (squared error on new sines)")
    for name, start in {"random": random_start(), "joint": joint, "maml": maml}.items():
        found = [errors(adapt(problem, start, support), query).detach() for problem in (strong, weak)]
        result |= {f"{name}_strong": float(found[0].mean()), f"{name}_weak": float(found[1].mean())}
        cells = [f"{part.mean():>7.2f} +- {part.std() / math.sqrt(len(part)):.2f}" for part in found]
        print(f"{name:<9}{cells[0]:<18}{cells[1]}")
    print(f"150 tasks, means with their standard errors; {failed} of {len(records)} linear solves failed.")
    return result


if __name__ == "__main__":
    main()
