"""The solution layer in three loops: plain torch, Lightning Fabric, and a Hugging Face Trainer, with the same result.

    python examples/stack/three_loops.py [--quick]

Features of a small network, and on them a ridge regression for each sine wave (amplitude 0.1 to 5, phase 0 to pi) from
10 points: the lower level, solved by linear algebra that autograd does not see. Above: the error on 10 other points, by
the network's weights. What a loop sees is a module whose forward pass returns a loss. A loop whose package is missing
is left out by name; the extra `stack` brings both. (Bertinetto et al. 2019, "R2-D2", is the idea.)
"""

import argparse
import math
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bilevel import CG, Params, Problem
from bilevel.hypergradients import lower_solution

Batches = list[dict[str, Tensor]]
POINTS, TASKS, WIDTH, RIDGE, RATE = 10, 8, 40, 0.02, 0.01


class Ridge(Problem):
    """The sum over sines of a regularised squared error; features [tasks, points, WIDTH + 1] come from above."""

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        errors = (upper["features"] @ lower["w"] - batch).square().mean(dim=(1, 2))
        return (errors + RIDGE * lower["w"].square().sum(dim=(1, 2))).sum()


class Sines(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh()).double()

    def features(self, X: Tensor) -> Tensor:
        return nn.functional.pad(self.body(X / 5.0), (0, 1), value=1.0)

    def forward(self, X: Tensor, t: Tensor) -> dict[str, Tensor]:
        """The loss of the regressions for points X and values t, [tasks, 2 * POINTS, 1]: half of them to learn from."""
        A, known = self.features(X[:, :POINTS]), t[:, :POINTS]
        with torch.no_grad():  # by linear algebra; any solver would do
            start = torch.linalg.solve(A.mT @ A + POINTS * RIDGE * torch.eye(WIDTH + 1).double(), A.mT @ known)
        w = lower_solution(Ridge(), {"features": A}, {"w": start}, [known], CG(100, 1e-6), on_failure="raise")["w"]
        return {"loss": (self.features(X[:, POINTS:]) @ w - t[:, POINTS:]).square().mean()}


def draw(count: int, seed: int) -> Batches:
    """`count` batches of sine waves."""
    generator = torch.Generator().manual_seed(seed)
    amplitude, phase = torch.rand(2, count, TASKS, 1, 1, generator=generator, dtype=torch.float64)
    X = 10.0 * torch.rand(count, TASKS, 2 * POINTS, 1, generator=generator, dtype=torch.float64) - 5.0
    t = (0.1 + 4.9 * amplitude) * torch.sin(X - math.pi * phase)
    return [{"X": X[k], "t": t[k]} for k in range(count)]


def plain(model: Sines, batches: Batches) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    for batch in batches:
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()


def fabric(model: Sines, batches: Batches) -> None:
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0))
    for batch in batches:
        optimizer.zero_grad()
        fabric.backward(model(**batch)["loss"])
        optimizer.step()


def trainer(model: Sines, batches: Batches) -> None:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    quiet = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
    same = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential"}
    options: dict[str, Any] = {"learning_rate": RATE, "per_device_train_batch_size": 1, "num_train_epochs": 1}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, use_cpu=True, **options, **quiet, **same)
        # A sample is a batch of sines, so that there is nothing to collate.
        data: dict[str, Any] = {"train_dataset": batches, "data_collator": lambda samples: samples[0]}
        loop = Trainer(model, arguments, **data)
        loop.remove_callback(PrinterCallback)
        loop.train()


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="5 steps instead of 300")
    steps = 5 if parser.parse_args(arguments).quick else 300
    loops: dict[str, Callable[[Sines, Batches], None]] = {"nothing": lambda model, batches: None, "plain torch": plain}
    loops |= {"Lightning Fabric": fabric, "Trainer": trainer}
    batches, new, result, found = draw(steps, seed=0), draw(20, seed=10**6), dict[str, float](), list[Tensor]()
    print("trained by         squared error on new sines   largest difference of weights")
    for name, train in loops.items():
        torch.manual_seed(0)
        model = Sines()
        try:
            train(model, batches)
        except ModuleNotFoundError as error:
            print(f"{name:<19}left out: {error.name} is not installed")
            continue
        found.append(nn.utils.parameters_to_vector(model.parameters()).detach())
        with torch.no_grad():
            result[name] = float(torch.stack([model(**batch)["loss"] for batch in new]).mean())
        result[f"{name}, apart"] = apart = float((found[-1] - found[min(1, len(found) - 1)]).abs().max())
        print(f"{name:<19}{result[name]:>26.3f}{'' if len(found) < 3 else f'{apart:>32.0e}'}")
    return result


if __name__ == "__main__":
    main()
