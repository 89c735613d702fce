"""Implicit MAML: an initialisation from which few-shot tasks are learned well, through the solutions of the tasks.

    python examples/imaml.py [--quick]

A task is to tell 5 characters apart by one image each; a character is one of scikit-learn's digits in one of eight
orientations, six of which are seen in meta-training. Lower level: y_i = argmin L_i(y) + lambda/2 ||y - x||^2 for 8
tasks at once, restarted at x. Upper level: the mean loss of the y_i on other images. The rival is joint training.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy

from bilevel import CG, AlternatingSchedule, Level, Params, Problem, Trainer, proximal

Batch = tuple[Tensor, Tensor]
WAYS, QUERIES, HIDDEN, TASKS, STEPS, SEEN, NEW = 5, 5, 48, 8, 15, range(6), range(6, 8)

pixels, DIGIT = map(torch.from_numpy, load_digits(return_X_y=True))
images = (pixels / 16 - 0.3).float().view(-1, 8, 8)
VIEWS = torch.stack([torch.rot90(i, k, (1, 2)) for i in (images, images.flip(2)) for k in range(4)]).flatten(2)
TRAIN, TEST = torch.randperm(len(DIGIT), generator=torch.Generator().manual_seed(100)).split([1200, 597])


def network(p: Params, X: Tensor) -> Tensor:
    """Scores of one network, or of one a task where all tensors have a leading dimension of tasks."""
    return (X @ p["w1"] + p["b1"]).tanh() @ p["w2"] + p["b2"]


def random_start() -> Params:
    w1 = torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(101)) / 4
    return {"w1": w1, "b1": torch.zeros(1, HIDDEN), "w2": torch.zeros(HIDDEN, WAYS), "b2": torch.zeros(1, WAYS)}


def draw(seed: int, count: int, pool: Tensor, orientations: range) -> tuple[Batch, Batch]:
    """Supports (one image a character) and queries of `count` tasks: inputs [tasks, images, 64] and labels."""
    generator = torch.Generator().manual_seed(seed)
    digits = torch.rand(count, 10, generator=generator).argsort(dim=1)[:, :WAYS]
    views = torch.randint(orientations.start, orientations.stop, (count, WAYS, 1), generator=generator)
    keys = torch.rand(count, WAYS, len(pool), generator=generator) + (DIGIT[pool] != digits[..., None])
    X = VIEWS[views, pool[keys.topk(1 + QUERIES, largest=False).indices]]
    t = torch.arange(WAYS).expand(count, WAYS)
    return (X[:, :, 0], t), (X[:, :, 1:].flatten(1, 2), t.repeat_interleave(QUERIES, dim=1))


class MAML(Problem):
    regularization_weight = 0.3

    def __init__(self, tasks: int) -> None:
        self.tasks = tasks

    def lower_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        # The sum over tasks, so that each solves a problem of its own.
        return self.tasks * self.upper_objective(upper, lower, batch)

    def upper_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        return cross_entropy(network(lower, batch[0]).flatten(0, -2), batch[1].flatten())

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return proximal({name: upper[name].expand_as(leaf) for name, leaf in lower.items()}, lower)

    def reset_lower(self, upper: Params) -> Params:
        return {name: leaf.detach().repeat(self.tasks, 1, 1) for name, leaf in upper.items()}


def fit(start: Params, groups: list[tuple[Batch, Batch]], upper_steps: int) -> Trainer:
    """An alternation a group of tasks, for both levels in this order: restart at x, steps on supports, on queries."""
    problem, upper = MAML(len(groups[0][0][1])), {name: leaf.clone() for name, leaf in start.items()}
    lower = problem.reset_lower(upper)
    trainer = Trainer(
        problem,
        Level(upper, torch.optim.Adam(upper.values(), lr=0.01), [query for _, query in groups]),
        Level(
            lower,
            torch.optim.SGD(lower.values(), lr=0.1, momentum=0.7),
            [support for support, _ in groups for _ in range(STEPS)],
        ),
        AlternatingSchedule(len(groups), STEPS, upper_steps),
        CG(40, rtol=3e-2),
    )
    trainer.run()
    return trainer


def joint_start(steps: int) -> Params:
    """The first layer of one classifier of all 60 characters seen, under a last layer of zeros."""
    g = torch.Generator().manual_seed(102)
    p = random_start() | {"w2": 0.1 * torch.randn(HIDDEN, 60, generator=g), "b2": torch.zeros(1, 60)}
    optimizer = torch.optim.Adam([leaf.requires_grad_() for leaf in p.values()], lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        index, view = TRAIN[torch.randperm(len(TRAIN), generator=g)[:128]], torch.randint(6, (128,), generator=g)
        MAML(1).upper_objective({}, p, (VIEWS[view, index], 6 * DIGIT[index] + view)).backward()
        optimizer.step()
    return random_start() | {"w1": p["w1"].detach(), "b1": p["b1"].detach()}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20 alternations instead of 200")
    alternations = 20 if parser.parse_args(arguments).quick else 200
    trainer = fit(random_start(), [draw(10**4 + k, TASKS, TRAIN, SEEN) for k in range(alternations)], upper_steps=1)
    starts = {"random": random_start(), "joint": joint_start(3 * alternations), "maml": trainer.levels["upper"].params}
    result: dict[str, float] = {"failed_solves": trainer.failures.total()}
    print("start       seen characters   new characters   (accuracy on new images)")
    for name, start in starts.items():
        for kind, views in (("seen", SEEN), ("new", NEW)):
            support, query = draw(10**7, 400, TEST, views)
            scores = network(fit(start, [(support, query)], upper_steps=0).levels["lower"].params, query[0])
            result[f"{name}_{kind}"] = 100.0 * float((scores.argmax(dim=-1) == query[1]).double().mean())
        print(f"{name:<12}{result[f'{name}_seen']:>14.1f}%{result[f'{name}_new']:>16.1f}%")
    print(f"400 tasks, standard errors about 0.5%; {result['failed_solves']} of {alternations} linear solves failed.")
    return result


if __name__ == "__main__":
    main()
