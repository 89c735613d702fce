"""Hessian-vector products of every provider: time in gradients, memory above a gradient's, error.

    python benchmarks/hvp/run.py --json benchmarks/results/hvp.json
    python benchmarks/hvp/run.py --device cuda --json benchmarks/results/hvp-cuda.json

Each product is timed against one plain gradient over the same batch in the same repeat, in float32; its error is the
distance from a float64 double backward (for Gauss-Newton that of another matrix, by design). Memory is the most that
tensors take up while a fresh linearization makes two products, less what one gradient takes up. `kept_over_recomputed`
divides the time of products on a kept graph by that of recomputed ones: `later` for every product after a batch's
first, `five` for five products, the first included. `operators` says where a product on a kept graph spends its time.
`--quick` takes two small networks.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from benchmarks import measuring
from benchmarks.hvp.models import Case, cases
from benchmarks.measuring import Timing
from bilevel import Params, tree
from bilevel.products import (
    ComposedObjective,
    FiniteDifference,
    ForwardOverReverse,
    GaussNewton,
    HVPProvider,
    ReverseOverReverse,
)

RECOMPUTED, KEPT = ReverseOverReverse(), ReverseOverReverse(keep_graph=True)
PROVIDERS: dict[str, HVPProvider] = {
    "reverse": RECOMPUTED,
    "reverse, kept graph": KEPT,
    "forward": ForwardOverReverse(),
    "central differences": FiniteDifference(),
    "one-sided differences": FiniteDifference(central=False),
    "Gauss-Newton": GaussNewton(),
}
PRODUCTS = 5
Figures = dict[str, Any]


def providers_for(case: Case) -> dict[str, HVPProvider]:
    """All of them; Gauss-Newton where the loss is convex in the outputs."""
    return {name: p for name, p in PROVIDERS.items() if name != "Gauss-Newton" or not case.contrastive}


def measure_case(case: Case, device: torch.device, repeats: int) -> Figures:
    objective, lower = case.objective(torch.float32, device)
    precise, point = case.objective(torch.float64, device)
    generator = torch.Generator().manual_seed(1)
    direction = {n: torch.randn(leaf.shape, generator=generator).to(device) for n, leaf in lower.items()}
    exact = RECOMPUTED.linearize(precise, {}, point).hessian(as_type(direction, torch.float64))
    providers = providers_for(case)
    linearizations = {name: provider.linearize(objective, {}, lower) for name, provider in providers.items()}
    errors = {name: distance(each.hessian(direction), exact) for name, each in linearizations.items()}
    plain = RECOMPUTED.linearize(objective, {}, lower)
    tasks: dict[str, Callable[[], object]] = {
        name: partial(each.hessian, direction) for name, each in linearizations.items()
    }
    tasks["gradient"] = lambda: plain.gradient_at({})
    tasks["first"] = lambda: KEPT.linearize(objective, {}, lower).hessian(direction)
    times = measuring.interleaved(tasks, repeats)
    kept = linearizations["reverse, kept graph"]
    graph_bytes, operators = kept.kept_bytes(), slowest_operators(tasks["reverse, kept graph"], device)
    # The graph that was timed must not be there while memory is measured.
    del kept, tasks, linearizations
    gradient_bytes = measuring.peak_memory(lambda: plain.gradient_at({}), device)
    peaks = {name: two_products(provider, objective, lower, direction, device) for name, provider in providers.items()}
    return {
        "case": case.name,
        "model": case.model,
        "batch": case.batch,
        "size": case.size,
        "parameters": tree.size(lower),
        "gradient_seconds": times["gradient"].record(),
        "gradient_peak_bytes": gradient_bytes,
        "graph_bytes": graph_bytes,
        "providers": {
            name: {
                "gradients": times[name].over(times["gradient"]).record(),
                "bytes_above_gradient": peaks[name] - gradient_bytes,
                "error": errors[name],
            }
            for name in providers
        },
        "kept_over_recomputed": kept_over_recomputed(times),
        "operators": operators,
    }


def kept_over_recomputed(times: dict[str, Timing]) -> Figures:
    rows = zip(times["first"].samples, times["reverse, kept graph"].samples, strict=True)
    several = Timing(tuple((first + (PRODUCTS - 1) * later) / PRODUCTS for first, later in rows))
    return {
        "later": times["reverse, kept graph"].over(times["reverse"]).record(),
        "five": several.over(times["reverse"]).record(),
    }


def two_products(
    provider: HVPProvider, objective: ComposedObjective, lower: Params, direction: Params, device: torch.device
) -> int:
    def run() -> None:
        linearization = provider.linearize(objective, {}, lower)
        linearization.hessian(direction)
        linearization.hessian(direction)

    return measuring.peak_memory(run, device)


def slowest_operators(task: Callable[[], object], device: torch.device, count: int = 5) -> dict[str, float]:
    """Share of the time that the slowest operators take themselves."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        task()
        measuring.synchronize()
    events = profile.key_averages()
    spent = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in events}
    total = sum(spent.values())
    return {name: spent[name] / total for name in sorted(spent, key=spent.__getitem__, reverse=True)[:count]}


def as_type(x: Params, dtype: torch.dtype) -> Params:
    return {name: leaf.to(dtype) for name, leaf in x.items()}


def distance(found: Params, exact: Params) -> float:
    return float(tree.norm(tree.sub(as_type(found, torch.float64), exact)) / tree.norm(exact))


def measure(chosen: Sequence[Case], device: torch.device, repeats: int) -> Figures:
    found = [measure_case(case, device, repeats) for case in chosen]
    return {
        "environment": measuring.environment(device),
        "repeats": repeats,
        "kept_over_recomputed": {row["case"]: row["kept_over_recomputed"] for row in found},
        "cases": found,
    }


def show(figures: Figures) -> None:
    header = ["provider", "time in gradients (quartiles)", "MiB above", "error"]
    for row in figures["cases"]:
        body = [
            [
                name,
                "{median:.2f} ({q1:.2f} to {q3:.2f})".format(**each["gradients"]),
                f"{each['bytes_above_gradient'] / 2**20:.1f}",
                f"{each['error']:.1e}",
            ]
            for name, each in row["providers"].items()
        ]
        ratios = row["kept_over_recomputed"]
        title = (
            f"{row['case']}: {row['parameters']} parameters, gradient {1e3 * row['gradient_seconds']['median']:.1f} ms "
            f"and {row['gradient_peak_bytes'] / 2**20:.1f} MiB, graph {row['graph_bytes'] / 2**20:.1f} MiB; kept over "
            f"recomputed {ratios['later']['median']:.2f}, over five products {ratios['five']['median']:.2f}"
        )
        measuring.show(title, header, body)


def main(arguments: Sequence[str] | None = None) -> None:
    options = measuring.parser(__doc__).parse_args(arguments)
    measuring.use_threads(options.threads)
    figures = measure(cases(quick=options.quick), options.device, 3 if options.quick else 11)
    show(figures)
    measuring.write_json(options.json, {"quick": options.quick, **figures})


if __name__ == "__main__":
    main()
