"""Micro-batching where it takes a process of its own: peak memory, and several ranks."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from benchmarks.measuring import free_port
from bilevel import Params, Problem, linearize
from bilevel.distributed import gather, mean_over_ranks
from bilevel.products.micro_batch import MicroBatched, micro_batched_gradient
from recipes.experiment.ranks.processes import Launch, Ranks
from tests.support.cases import joined, vector
from tests.support.paths import ROOT

MEMORY = """
import re
import torch
from torch import nn
from bilevel import Problem, functional_call, linearize
from bilevel.products.micro_batch import MicroBatched

class Wide(Problem):
    def __init__(self):
        layers = [layer for _ in range(3) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.Tanh())]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    def lower_outputs(self, upper, lower, batch):
        return functional_call(self.net, lower, batch * upper["scale"])
    def lower_output_loss(self, upper, outputs, batch):
        return (outputs @ outputs.T).logsumexp(dim=1).mean()
    def lower_objective(self, upper, lower, batch):
        raise AssertionError
    upper_objective = lower_objective

torch.set_num_threads(1)
problem, images = Wide(), torch.randn(64, 8, 48, 48)
upper, lower = {"scale": torch.ones(())}, {n: p.detach() for n, p in problem.net.named_parameters()}

def peak(samples, size):
    system = linearize(problem, upper, lower, [images[:samples]], hvp=MicroBatched(size))
    system.cross(system.operator(lower))
    system.gradient()
    return re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]

peak(1, 1)
print(peak(2, 2), peak(8, 4), peak(64, 4), peak(64, 64))
"""


def test_a_products_memory_grows_with_the_chunk_and_not_with_the_batch() -> None:
    # getrusage would tell the parent's peak where that is higher.
    status = Path("/proc/self/status")
    if not status.exists() or "VmHWM" not in status.read_text():
        pytest.skip("the system does not tell a process's own peak")
    root = ROOT
    run = subprocess.run(
        [sys.executable, "-c", MEMORY], cwd=root, capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 0, run.stderr
    # High-water marks of one process, so that each can only be above the one before.
    idle, small, large_batch, large_chunk = map(int, run.stdout.split())
    assert large_batch - small < 0.25 * (large_chunk - large_batch)
    assert large_chunk - idle > 4 * (large_batch - idle)


WORLD = 2
POINTS = vector(8 * 3, 70).reshape(8, 3)


class Contrastive(Problem):
    """Every embedding against all of the global batch, which the loss gathers over the ranks; the upper variables tilt
    the embeddings and weight their features in the loss, or do the latter alone."""

    def __init__(self, *, tilted: bool) -> None:
        self.tilted = tilted

    def lower_outputs(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        embedded = torch.tanh(batch @ lower["w"]) * lower["scale"]
        return embedded * torch.exp(upper["tilt"]) if self.tilted else embedded

    def lower_output_loss(self, upper: Params, outputs: Tensor, batch: Tensor) -> Tensor:
        everywhere = gather(outputs)
        similar = (everywhere * torch.exp(upper["weights"])) @ everywhere.T
        return (similar.logsumexp(dim=1) - similar.roll(1, dims=0).diagonal()).mean()

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return self.lower_output_loss(upper, self.lower_outputs(upper, lower, batch), batch)

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return self.lower_objective(upper, lower, batch)


UPPER = {"tilt": vector(2, 72), "weights": vector(2, 76)}
LOWER = {"w": vector(6, 73).reshape(3, 2), "scale": torch.tensor(0.8, dtype=torch.float64)}
DIRECTION = {"w": vector(6, 74).reshape(3, 2), "scale": vector(1, 75)[0]}


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    Ranks(Launch(rank, WORLD, rank, "127.0.0.1", port)).join(torch.device("cpu"), 100.0)
    batch = POINTS.chunk(WORLD)[rank]
    # Four chunks on the first rank, two on the second.
    found = [derivatives(Contrastive(tilted=tilted), batch, rank + 1) for tilted in (True, False)]
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


def derivatives(problem: Problem, batch: Tensor, size: int) -> dict[str, Tensor]:
    system = linearize(problem, UPPER, LOWER, [batch], hvp=MicroBatched(size))
    loss, gradient = micro_batched_gradient(
        lambda y, chunk: problem.lower_outputs(UPPER, y, chunk),
        lambda z: problem.lower_output_loss(UPPER, z, batch),
        LOWER,
        problem.split_batch(batch, size),
    )
    return {
        "loss": loss,
        "gradient": joined(mean_over_ranks(gradient)),
        "same gradient": joined(system.gradient()),
        "product": joined(system.operator(DIRECTION)),
        "cross": joined(system.cross(DIRECTION)),
    }


def derivatives_by_hand(problem: Problem) -> dict[str, Tensor]:
    """In one process, by plain autograd."""
    x = [leaf.clone().requires_grad_() for leaf in UPPER.values()]
    y = [leaf.clone().requires_grad_() for leaf in LOWER.values()]
    loss = problem.lower_objective(dict(zip(UPPER, x, strict=True)), dict(zip(LOWER, y, strict=True)), POINTS)
    slope = torch.autograd.grad(loss, y, create_graph=True)
    along = torch.stack([(g * d).sum() for g, d in zip(slope, DIRECTION.values(), strict=True)]).sum()
    found = torch.autograd.grad(along, [*y, *x], allow_unused=True, materialize_grads=True)
    gradient = torch.cat([g.detach().flatten() for g in slope])
    return {
        "loss": loss.detach(),
        "gradient": gradient,
        "same gradient": gradient,
        "product": torch.cat([p.flatten() for p in found[: len(y)]]),
        "cross": torch.cat(found[len(y) :]),
    }


def test_two_ranks_with_different_numbers_of_chunks_equal_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Public by its documentation, if not by its module's list of names.
    context = torch.multiprocessing.spawn(  # pyright: ignore[reportPrivateImportUsage]
        worker, (free_port(), str(tmp_path)), nprocs=WORLD, join=False
    )
    assert context is not None
    deadline = time.monotonic() + 120
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "the ranks did not come to an end together"
    finally:
        for process in context.processes:
            assert process is not None
            process.kill()
    expected = [derivatives_by_hand(Contrastive(tilted=tilted)) for tilted in (True, False)]
    for rank in range(WORLD):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
