"""A lower level too large for one device: what torch's sharded parameters do with second derivatives, on two ranks.

    python benchmarks/sharding/run.py --json benchmarks/results/sharding.json --docs docs/scaling.md
    python benchmarks/sharding/run.py --from benchmarks/results/sharding.json --docs docs/scaling.md --check

Two processes of this machine talk through gloo over its loopback interface. The figures of other versions of torch that
the JSON file holds already are kept.
"""

import json
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from benchmarks import measuring
from benchmarks.pages import update
from benchmarks.sharding import with_bilevel
from benchmarks.sharding.tables import tables
from benchmarks.sharding.trials import (
    SHARDED,
    TENSOR_PARALLEL,
    Case,
    called,
    distributed_tensors,
    fully_sharded,
    gathered_loss,
    loss_of,
    net,
)
from bilevel import CG, Identity, Implicit, Params, Problem, functional_call, hypergradient, proximal, tree
from bilevel.linear import Solver
from recipes.experiment.ranks.processes import Launch, Ranks

RANKS = 2
DEADLINE = 900.0
SOLVES: dict[str, Solver] = {"CG, 5 iterations": CG(5, None), "no product (identity)": Identity()}


def trials(case: Case) -> list[dict[str, Any]]:
    """All of them, in order; the same on every rank."""
    found = [*fully_sharded(case), *distributed_tensors(case)]
    found += [*with_bilevel.arithmetic(case), *with_bilevel.solves(case)]
    found += [with_bilevel.by_hand(case), with_bilevel.shards_itself(case)]
    found += [*with_bilevel.entries(case), *with_bilevel.modules(case)]
    return [asdict(trial) for trial in found]


def collectives(run: Callable[[], object]) -> dict[str, int] | None:
    """How often each collective is called; None where torch cannot do what `run` wants."""
    try:
        with CommDebugMode() as mode:
            run()
    except RuntimeError:
        return None
    counts = mode.get_comm_counts()
    return {str(name).rpartition(".")[2]: count for name, count in counts.items() if count}


def exchanges(case: Case) -> dict[str, dict[str, int] | None]:
    """Collectives of a gradient and a product on the small net of four tensors and one pair of layers, and of an
    iteration of conjugate gradients."""
    sharded = tree.as_variables(case.cut(case.values, SHARDED))
    module = parallelize_module(net(), case.mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    parallel = tree.as_variables(dict(module.named_parameters()))

    def product(loss: Callable[[], Tensor], variables: Params, vector: Params) -> object:
        leaves = list(variables.values())
        gradient = torch.autograd.grad(loss(), leaves, create_graph=True)
        return torch.autograd.grad(gradient, leaves, grad_outputs=list(vector.values()))

    def of_cg(iterations: int) -> int:
        def stretched(v: Params) -> Params:
            return {name: leaf * float(1 + k) for k, (name, leaf) in enumerate(v.items())}

        return sum((collectives(lambda: CG(iterations, None).solve(stretched, v)) or {}).values())

    v, w = case.cut(case.vector, SHARDED), case.cut(case.vector, TENSOR_PARALLEL)
    return {
        "gradient and product, gathered once": collectives(
            lambda: product(lambda: gathered_loss(case, sharded), sharded, v)
        ),
        "gradient and product, tensor-parallel": collectives(
            lambda: product(lambda: loss_of(called(module, parallel, case.x), case.y), parallel, w)
        ),
        "an iteration of CG, its product apart": {"all_reduce": of_cg(3) - of_cg(2)},
    }


class Square(Problem):
    """A network with many parameters for few activations."""

    regularization_weight = 1.0
    check_curvature = False

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return functional_call(self.module, lower, batch).square().mean()

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return functional_call(self.module, lower, batch).sin().mean()

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return proximal(upper, lower)


def vectors(*, quick: bool) -> dict[str, dict[str, float]]:
    """Peak memory of a hypergradient above its variables, in vectors of the lower level's length, by K."""
    width = 100 if quick else 600
    module = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(3)))
    lower = {name: p.detach() for name, p in module.named_parameters()}
    upper, problem = {name: leaf.clone() for name, leaf in lower.items()}, Square(module)
    batches = [torch.randn(2, width) for _ in range(5)]
    found: dict[str, dict[str, float]] = {}
    for name, solver in SOLVES.items():
        for count in (1, 5):

            def step(solver: Solver = solver, count: int = count) -> object:
                return hypergradient(
                    *(problem, upper, lower, Implicit(solver)),
                    upper_batch=batches[0],
                    lower_batches=batches[:count],
                    on_failure="ignore",
                )

            step()
            bytes_ = measuring.peak_memory(step)
            found.setdefault(name, {})[str(count)] = bytes_ / (4.0 * tree.size(lower))
    return found


def worker(rank: int, port: int, path: str) -> None:
    torch.set_num_threads(1)
    # What is tried here is what torch warns of.
    warnings.simplefilter("ignore")
    Ranks(Launch(rank, RANKS, rank, "127.0.0.1", port)).join(torch.device("cpu"), 300.0)
    case = Case(init_device_mesh("cpu", (RANKS,)))
    found = {"trials": trials(case), "collectives": exchanges(case)}
    if rank == 0:
        measuring.write_json(Path(path), found)
    dist.destroy_process_group()


def measure(*, quick: bool) -> dict[str, Any]:
    """Of the torch that is installed."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path, port = Path(folder) / "found.json", measuring.free_port()
        processes = [context.Process(target=worker, args=(rank, port, str(path))) for rank in range(RANKS)]
        deadline = time.monotonic() + DEADLINE
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            if [process.exitcode for process in processes] != [0] * RANKS:
                raise RuntimeError(f"the ranks did not end: exit codes {[process.exitcode for process in processes]}")
        finally:
            for process in processes:
                process.kill()
                process.join()
        found = json.loads(path.read_text(encoding="utf-8"))
    return {"environment": measuring.environment(), "quick": quick, **found, "vectors": vectors(quick=quick)}


def main(arguments: list[str] | None = None) -> int:
    command_line = measuring.parser(__doc__)
    command_line.add_argument("--from", type=Path, dest="source", help="take figures from this file")
    command_line.add_argument("--docs", type=Path, help="put the tables between the markers of this page")
    command_line.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the page differs")
    options = command_line.parse_args(arguments)
    if options.check and not options.docs:
        command_line.error("--check needs --docs")
    measuring.use_threads(options.threads or 1)
    if options.source:
        figures = json.loads(options.source.read_text(encoding="utf-8"))
    else:
        kept = options.json and options.json.is_file() and json.loads(options.json.read_text(encoding="utf-8"))
        figures = {**(kept or {}), torch.__version__: measure(quick=options.quick)}
    measuring.write_json(options.json, figures)
    if not options.docs:
        for version, found in figures.items():
            rows = [[trial[key] or "" for key in ("part", "what", "answer", "message")] for trial in found["trials"]]
            measuring.show(f"torch {version}", ("part", "what", "outcome", "message"), rows)
        return 0
    return update(options.docs, tables(figures), check=options.check)


if __name__ == "__main__":
    sys.exit(main())
