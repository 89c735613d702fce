"""An equilibrium network trained by implicit gradients, beside the same network unrolled.

    python examples/equilibrium.py [--quick]

Lower level: the state z = tanh(z W' + U x + b) of every image, where W is scaled to a spectral norm below 1, found by
iteration. Upper level: the loss of a linear classifier of z, over all weights. The backward pass solves the adjoint
fixed point instead of passing back through the iterations, so that what is kept for it does not grow with their number.
Data: scikit-learn's digits, 600 of them for training.
"""

import argparse
import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bilevel import Params, lower_solution
from bilevel.linear import AdjointIteration
from bilevel.lower import FixedPointProblem

STATE, RATE, BATCH, KEYS = 48, 5e-3, 100, ("test", "run_on", "kept", "ms")


class State(FixedPointProblem):
    """The images come in through the upper variable `input` = U x + b, which has a graph of its own."""

    def fixed_point_map(self, upper: Params, lower: Params, batch: None) -> Params:
        return {"z": (lower["z"] @ upper["weight"].T + upper["input"]).tanh()}


class Network(nn.Module):
    """`steps` iterations with their graph, or for None the equilibrium."""

    def __init__(self, steps: int | None) -> None:
        super().__init__()
        self.steps, self.iterations = steps, 0
        self.recurrent = nn.Parameter(torch.randn(STATE, STATE) / STATE**0.5)
        self.inject, self.classify = nn.Linear(64, STATE), nn.Linear(STATE, 10)

    def forward(self, X: Tensor) -> Tensor:
        norm = torch.linalg.matrix_norm(self.recurrent, 2)
        upper = {"weight": self.recurrent * (0.95 / norm.clamp(min=0.95)), "input": self.inject(X)}
        return self.classify(self.state(upper))

    def state(self, upper: Params) -> Tensor:
        z = {"z": torch.zeros_like(upper["input"])}
        with torch.set_grad_enabled(self.steps is not None and torch.is_grad_enabled()):
            for count in range(self.steps or 300):
                self.iterations, former, z = count + 1, z, State().fixed_point_map(upper, z, None)
                if self.steps is None and (z["z"] - former["z"]).norm() <= 1e-4 * z["z"].norm():
                    break
        solver = AdjointIteration(200, rtol=1e-3)
        return (z if self.steps else lower_solution(State(), upper, z, [None], solver, on_failure="raise"))["z"]


def train(network: nn.Module, X: Tensor, t: Tensor, seed: int, steps: int) -> float:
    """Adam on batches of 100; seconds of the processor a step."""
    optimizer, generator = torch.optim.Adam(network.parameters(), lr=RATE), torch.Generator().manual_seed(seed)
    start = time.process_time()
    for _ in range(steps):
        index = torch.randperm(len(X), generator=generator)[:BATCH]
        optimizer.zero_grad()
        cross_entropy(network(X[index]), t[index]).backward()
        optimizer.step()
    return (time.process_time() - start) / steps


def kept(output: Tensor) -> float:
    """KiB of the tensors that the graph of an output holds for the backward pass."""
    nodes, sizes, found = [output.grad_fn], {}, set()
    while nodes:
        node = nodes.pop()
        if node is None or node in found:
            continue
        found.add(node)
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for tensor in [*saved, *getattr(node, "saved_tensors", ())]:
            if isinstance(tensor, Tensor):
                sizes[tensor.data_ptr()] = tensor.nbytes
        nodes += [following for following, _ in node.next_functions]
    return sum(sizes.values()) / 1024


@torch.no_grad()
def accuracy(network: nn.Module, X: Tensor, t: Tensor) -> float:
    return 100.0 * float((network(X).argmax(dim=1) == t).double().mean())


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1 seed and 100 steps instead of 3 and 300")
    seeds, steps = (1, 100) if parser.parse_args(arguments).quick else (3, 300)
    X, t = map(torch.from_numpy, load_digits(return_X_y=True))
    rows: dict[str, list[tuple[float, ...]]] = {}
    for seed in range(100, 100 + seeds):
        order = torch.randperm(len(t), generator=torch.Generator().manual_seed(seed))
        images, labels = X[order].float() / 16, t[order]
        for name, depth in (("linear", 0), ("1 iteration", 1), ("3", 3), ("30", 30), ("equilibrium", None)):
            torch.manual_seed(seed)
            network = Network(depth) if depth != 0 else nn.Linear(64, 10)
            seconds = train(network, images[:600], labels[:600], seed, steps)
            memory, test = kept(network(images[:BATCH])), (images[600:], labels[600:])
            reached = accuracy(network, *test)
            if isinstance(network, Network) and depth:
                network.steps = 300
            rows.setdefault(name, []).append((reached, accuracy(network, *test), memory, 1000 * seconds))
    print("trained with   test accuracy   run on to the equilibrium   KiB kept")
    result = {name: dict(zip(KEYS, torch.tensor(row).mean(0).tolist(), strict=True)) for name, row in rows.items()}
    for name, row in result.items():
        print(f"{name:<15}{row['test']:>12.1f}%{row['run_on']:>27.1f}%{row['kept']:>11.0f}")
    print(f"{seeds} seeds, {len(X) - 600} test images; {network.iterations} iterations to the last equilibrium.")
    return result


if __name__ == "__main__":
    main()
