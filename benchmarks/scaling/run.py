"""Time and memory of a hypergradient as parameters, batch, Hessian batches and upper steps grow, and a cost model.

    python benchmarks/scaling/run.py --json benchmarks/results/scaling.json --docs docs/scaling.md
    python benchmarks/scaling/run.py --from benchmarks/results/scaling.json --docs docs/scaling.md --check

The prediction is worked out anew by every call, from the options (`--rate`, `--bandwidth`, `--latency`, `--cores`,
`--memory`), the cost of a product measured here, and the kept figures of the other benchmarks (`assumptions`).
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from scipy import stats
from torch import Tensor, nn

from benchmarks import measuring
from benchmarks.pages import update
from benchmarks.scaling import assumptions
from benchmarks.scaling import model as scaling_model
from benchmarks.scaling.tables import predicted
from benchmarks.solvers import tables as solvers_tables
from benchmarks.solvers.network import Contrastive, network
from bilevel import CG, linearize
from bilevel.compare import lower_gradient
from bilevel.products import HVPProvider, ReverseOverReverse

PROVIDERS: dict[str, HVPProvider] = {
    "rebuilt": ReverseOverReverse(),
    "kept": ReverseOverReverse(keep_graph=True),
}
WORDS = {
    "width": "parameters P",
    "batch_size": "batch B",
    "hessian_batches": "Hessian batches K",
    "upper_steps": "upper steps N_U",
}
GPUS = (1, 8, 64)


@dataclass(frozen=True)
class Size:
    """One hypergradient step's size; `iterations` products with the mean over the Hessian batches, each upper step."""

    width: int = 8
    batch_size: int = 32
    hessian_batches: int = 2
    upper_steps: int = 1
    iterations: int = 2
    pixels: int = 16


def grids(*, quick: bool) -> dict[str, Sequence[int]]:
    if quick:
        return {"width": (1, 2, 4), "batch_size": (2, 4, 8), "hessian_batches": (1, 2, 3), "upper_steps": (1, 2, 3)}
    return {
        "width": (8, 16, 32, 64),
        "batch_size": (32, 64, 128, 256),
        "hessian_batches": (1, 2, 4, 8),
        "upper_steps": (1, 2, 4, 8),
    }


class Step:
    """The upper steps of one alternation on a contrastive network of this size, with random images."""

    def __init__(self, size: Size, device: torch.device) -> None:
        torch.manual_seed(0)
        self.size = size
        module = network(size.width, nn.ReLU).to(device)
        self.problem = Contrastive(module, torch.randn(16, 10, device=device) / 4.0, 10.0)
        self.lower = {name: p.detach().clone() for name, p in module.named_parameters()}
        self.upper = {name: p.clone() for name, p in self.lower.items()}
        shape = (2, size.batch_size, 1, size.pixels, size.pixels)
        self.batches = [torch.randn(shape, device=device) for _ in range(size.hessian_batches)]
        labels = torch.randint(10, (size.batch_size,), device=device)
        self.upper_batch = (torch.randn(shape[1:], device=device), labels)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.lower.values())

    def gradient(self) -> None:
        lower_gradient(self.problem, {}, self.lower, self.batches[0])

    def product(self, hvp: HVPProvider) -> Callable[[], object]:
        """A product on the first batch, its linearization made beforehand."""
        operator = linearize(self.problem, self.upper, self.lower, self.batches[:1], hvp=hvp).operator
        vector: dict[str, Tensor] = {name: torch.randn_like(p) for name, p in self.lower.items()}
        operator(vector)
        return lambda: operator(vector)

    def __call__(self, hvp: HVPProvider) -> None:
        solver = CG(self.size.iterations, None)
        system = linearize(self.problem, self.upper, self.lower, self.batches, solver=solver, hvp=hvp)
        for _ in range(self.size.upper_steps):
            system.hypergradient(self.upper_batch, on_failure="ignore")


def fit(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Exponent b of ``y = a x^b`` by least squares of the logarithms, with its 95% interval."""
    # Its stub does not name the fields of what comes back.
    found: Any = stats.linregress([math.log(value) for value in x], [math.log(value) for value in y])
    # A straight line without any deviation, as of a memory that does not grow, has an error of 0 / 0.
    error = 0.0 if math.isnan(found.stderr) else float(found.stderr)
    half = float(stats.t.ppf(0.975, len(x) - 2)) * error
    return {"exponent": float(found.slope), "low": float(found.slope) - half, "high": float(found.slope) + half}


def measure_sizes(*, quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """Seconds and bytes for every size of every grid, with graphs rebuilt and kept."""
    rows = []
    base = Size(width=1, batch_size=4, pixels=8) if quick else Size()
    for what, values in grids(quick=quick).items():
        steps = {value: Step(replace(base, **{what: value}), device) for value in values}
        for name, hvp in PROVIDERS.items():
            functions = {str(v): lambda step=step, hvp=hvp: step(hvp) for v, step in steps.items()}
            seconds = measuring.interleaved(functions, 1 if quick else 3)
            for value, step in steps.items():
                rows.append(
                    {
                        "what": what,
                        "value": step.parameters if what == "width" else value,
                        "graphs": name,
                        "seconds": seconds[str(value)].record(),
                        "bytes": measuring.peak_memory(lambda step=step, hvp=hvp: step(hvp), device),
                    }
                )
    return rows


def fits(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for what in WORDS:
        for graphs in PROVIDERS:
            chosen = [row for row in rows if (row["what"], row["graphs"]) == (what, graphs)]
            x = [row["value"] for row in chosen]
            found.append(
                {
                    "what": what,
                    "graphs": graphs,
                    "time": fit(x, [row["seconds"]["median"] for row in chosen]),
                    "memory": fit(x, [row["bytes"] for row in chosen]),
                }
            )
    return found


def measure_products(*, quick: bool, device: torch.device) -> dict[str, Any]:
    """Cost of a product in gradients, at the largest width."""
    step = Step(Size(width=2, batch_size=4, pixels=8) if quick else Size(width=32, batch_size=64), device)
    functions: dict[str, Callable[[], object]] = {"gradient": step.gradient}
    for name, hvp in PROVIDERS.items():
        functions[name] = step.product(hvp)
    seconds = measuring.interleaved(functions, 3 if quick else 21)
    return {name: seconds[name].over(seconds["gradient"]).record() for name in PROVIDERS}


def measure(*, quick: bool, device: torch.device) -> dict[str, Any]:
    rows = measure_sizes(quick=quick, device=device)
    return {
        "quick": quick,
        "environment": measuring.environment(device),
        "sizes": rows,
        "fits": fits(rows),
        "products": measure_products(quick=quick, device=device),
        "counted": assumptions.count(quick=quick),
    }


def prediction(figures: dict[str, Any], chosen: dict[str, float]) -> dict[str, Any]:
    """The assumptions, and all tables that follow from them; `chosen` as for `assumptions.gather`."""
    assumed = assumptions.gather(figures["counted"], figures["products"]["rebuilt"]["median"], **chosen)
    return {"assumptions": assumed, **scaling_model.everything(assumed, GPUS)}


FIT_HEADER = ("grows", "range", "graphs", "time: exponent (95%)", "memory: exponent (95%)", "memory, MiB")


def fit_rows(figures: dict[str, Any]) -> list[list[str]]:
    body = []
    for row in figures["fits"]:
        chosen = [r for r in figures["sizes"] if (r["what"], r["graphs"]) == (row["what"], row["graphs"])]
        exponents = [f"{e['exponent']:.2f} ({e['low']:.2f} to {e['high']:.2f})" for e in (row["time"], row["memory"])]
        mebibytes = f"{chosen[0]['bytes'] / 2**20:.1f} to {chosen[-1]['bytes'] / 2**20:.1f}"
        span = f"{chosen[0]['value']:,} to {chosen[-1]['value']:,}"
        body.append([WORDS[row["what"]], span, row["graphs"], *exponents, mebibytes])
    return body


def tables(figures: dict[str, Any]) -> dict[str, str]:
    ratios = ", ".join(f"graphs {name} {solvers_tables.spread_of(figures['products'][name])}" for name in PROVIDERS)
    return {
        "conditions": solvers_tables.conditions(figures),
        "exponents": solvers_tables.table(FIT_HEADER, fit_rows(figures)),
        "products": f"One product in gradients over the same batch, median and quartiles: {ratios}.",
        **predicted(figures),
    }


def parser() -> argparse.ArgumentParser:
    options = measuring.parser(__doc__)
    options.add_argument("--rate", type=float, default=15_000.0, help="images a second of one GPU, both views (15000)")
    options.add_argument("--bandwidth", type=float, default=50.0, help="GB a second that a GPU sends (50)")
    options.add_argument("--latency", type=float, default=20.0, help="microseconds of the smallest collective (20)")
    options.add_argument("--cores", type=float, default=12.0, help="cores that load for one GPU (12)")
    options.add_argument("--memory", type=float, default=80.0, help="GB of one GPU (80)")
    options.add_argument("--from", type=Path, dest="source", help="take measurements from this file")
    options.add_argument("--recount", action="store_true", help="with --from: count memory and operations again")
    options.add_argument("--docs", type=Path, help="put the tables between the markers of this page")
    options.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the page differs")
    return options


def main(arguments: list[str] | None = None) -> int:
    command_line = parser()
    options = command_line.parse_args(arguments)
    if options.check and not options.docs:
        command_line.error("--check needs --docs")
    if options.recount and not options.source:
        command_line.error("--recount needs --from")
    units = {"rate": 1.0, "bandwidth": 1e9, "latency": 1e-6, "cores": 1.0, "memory": 1e9}
    chosen = {name: unit * getattr(options, name) for name, unit in units.items()}
    if not all(0.0 < value < math.inf for value in chosen.values()):
        command_line.error("--rate, --bandwidth, --latency, --cores and --memory must be positive numbers")
    measuring.use_threads(options.threads)
    if options.source:
        figures = json.loads(options.source.read_text(encoding="utf-8"))
        if options.recount:
            figures["counted"] = assumptions.count(quick=options.quick)
    else:
        figures = measure(quick=options.quick, device=options.device)
    figures |= prediction(figures, chosen)
    measuring.write_json(options.json, figures)
    if options.docs:
        return update(options.docs, tables(figures), check=options.check)
    measuring.show("Exponents", FIT_HEADER, fit_rows(figures))
    for name, text in predicted(figures).items():
        print(f"\n{name}\n\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
