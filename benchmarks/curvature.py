"""What the examination for lost curvature costs: milliseconds a structure, and its share of a run on photographs.

    taskset -c 1 python benchmarks/curvature.py --images folder:PATH --json benchmarks/results/curvature.json \\
        --docs docs/reliability.md

- ``walk``: milliseconds to go through the graph of a gradient and its objective.
- ``examination``: seconds of everything that is done once for a Problem, the walk and the comparison of products with
  differences of gradients in float64 on 8 samples, in seconds of the processor.
- ``share``: a short run of the recipe's preset `images` (a few of its steps) and what its examinations take. A whole
  run makes the same ones.

Everything in one thread. Without ``--images`` the share stays as it is in the JSON file.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

from benchmarks.measuring import environment, parser, show, use_threads, write_json
from benchmarks.overhead import run_quietly
from benchmarks.pages import conditions, table, update
from bilevel import Params, Problem, functional_call, tree
from bilevel.lower import examine_curvature
from bilevel.nn import curvature_pass
from bilevel.products import ReverseOverReverse, graph_nodes, suspicious_operations
from recipes.vision.networks.backbones import build_backbone

SAMPLES, REPEATS = 64, 15
SHORT = (
    *("--preset=images", "--threads=1", "--seeds=1", "--arms=bissl,baseline", "--data.test-fraction=0.01"),
    *("--pretext.epochs=1", "--pretext.warmup-epochs=0", "--pretext.monitor-every=1", "--pretext.checkpoint-every=1"),
    *("--head.epochs=1", "--bissl.alternations=1", "--bissl.lower-warmup-epochs=0", "--finetune.epochs=1"),
    "--finetune.validate-every=1",
)


class Weighted(Problem):
    """Sample weights on a classifier's losses."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        inputs, labels, rows = batch
        outputs = functional_call(self.module, lower, (inputs,))
        return (upper["x"][rows].sigmoid() * nn.functional.cross_entropy(outputs, labels, reduction="none")).mean()

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return self.lower_objective(upper, lower, batch)


class Recurrent(nn.Module):
    """An LSTM over 32 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(96, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.lstm(images.flatten(1).unflatten(1, (32, 96)))[0][:, -1])


def classifier(backbone: str) -> nn.Module:
    """A backbone of the recipe for images of 32 px, and a linear layer."""
    network = build_backbone(backbone, image_size=32)
    return nn.Sequential(network, nn.Linear(network.num_features, 10))


STRUCTURES: dict[str, Callable[[], nn.Module]] = {
    "perceptron, 2 layers": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 10)),
    "LSTM, 32 steps": Recurrent,
    "resnet-tiny": lambda: classifier("resnet-tiny"),
    "ResNet-18": lambda: classifier("resnet18"),
}


def measure(make: Callable[[], nn.Module]) -> dict[str, float]:
    """Figures of one structure."""
    torch.manual_seed(0)
    module = make()
    lower = {name: p.detach().clone() for name, p in module.named_parameters()}
    upper = {"x": torch.zeros(SAMPLES)}
    batch = (torch.randn(SAMPLES, 3, 32, 32), torch.randint(10, (SAMPLES,)), torch.arange(SAMPLES))
    problem = Weighted(module)
    y = tree.as_variables(lower)
    with curvature_pass(0):
        loss = problem.lower_objective(upper, y, tree.map_tensors(lambda tensor: tensor[:8], batch))
    graph = [loss, *tree.gradients(loss, y, create_graph=True).values()]
    walks = [seconds(lambda: suspicious_operations(graph)) for _ in range(REPEATS)]
    provider = ReverseOverReverse()
    examined = seconds(lambda: examine_curvature(problem, upper, lower, batch, tuple(lower), provider))
    known = examine_curvature(problem, upper, lower, batch, tuple(lower), provider)
    solve = seconds(lambda: [provider.linearize(_whole(problem, batch), upper, lower).hessian(lower) for _ in range(5)])
    return {
        "variables": tree.size(lower),
        "nodes": len(graph_nodes(graph)),
        "walk": sorted(walks)[REPEATS // 2],
        "examination": examined,
        "compared": float(bool(known.errors)),
        "five products": solve,
    }


def _whole(problem: Problem, batch: Any) -> Callable[[Params, Params], Tensor]:
    def objective(upper: Params, lower: Params) -> Tensor:
        with curvature_pass(0):
            return problem.lower_objective(upper, lower, batch)

    return objective


def seconds(function: Callable[[], object]) -> float:
    """Of the processor, in this thread: other work on the machine disturbs them the least."""
    began = time.thread_time()
    function()
    return time.thread_time() - began


def share(images: str) -> dict[str, float]:
    """The seconds of a short run of the preset, and of its examinations."""
    spent: list[float] = []

    def watched(*arguments: Any) -> Any:
        began = time.perf_counter()
        known = examine_curvature(*arguments)
        spent.append(time.perf_counter() - began)
        return known

    began = time.perf_counter()
    with patch("bilevel.hypergradients.system.examine_curvature", watched):
        run_quietly([*SHORT, f"--data.pretext={images}", f"--data.downstream={images}"])
    return {"seconds": time.perf_counter() - began, "examination": sum(spent), "calls": len(spent)}


def rows(figures: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            *(name, f"{row['variables']:,}", str(row["nodes"]), f"{1e3 * row['walk']:.2f}"),
            f"{row['examination']:.2f}" + ("" if row["compared"] else " (walk alone)"),
            f"{row['five products']:.2f}",
        ]
        for name, row in figures["structures"].items()
    ]


HEADER = ["lower level", "numbers", "nodes", "walk, ms", "examination, s", "five products on 64 samples, s"]


def text(figures: Mapping[str, Any]) -> str:
    run = figures["share"]
    part = 100.0 * run["examination"] / run["seconds"]
    return (
        f"{table(HEADER, rows(figures))}\n\nA run of {run['seconds']:.0f} s that makes a few of the steps of the "
        f"preset `images`, and all of its examinations, spends {run['examination']:.2f} s on these, {part:.1f} %. "
        f"{conditions(figures)}"
    )


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--images", help="folder:PATH, of class folders, for the share of a run")
    options.add_argument("--docs", type=Path, help="write the table into this page")
    arguments = options.parse_args()
    path = arguments.json
    figures = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {}
    use_threads(1)
    structures = dict(list(STRUCTURES.items())[:1]) if arguments.quick else STRUCTURES
    figures |= {"quick": arguments.quick, "environment": environment()}
    figures["structures"] = {name: measure(make) for name, make in structures.items()}
    if arguments.images is not None:
        figures["share"] = share(arguments.images)
    write_json(path, figures)
    show("Examination", HEADER, rows(figures))
    if arguments.docs is None:
        return 0
    if "share" not in figures:
        options.error("--docs: nothing is kept of the share of a run; pass --images")
    return update(arguments.docs, {"curvature": text(figures)}, check=False)


if __name__ == "__main__":
    sys.exit(main())
