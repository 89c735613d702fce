"""Hypergradients and linear solves of published packages beside this one's, on the same problems in one run.

    pip install -e ".[bench]"
    pip install "pip<24.1" && pip install --no-deps betty-ml boat-torch higher
    python benchmarks/peers/run.py --json benchmarks/results/peers.json --docs docs/peers.md
    python benchmarks/peers/run.py --from benchmarks/results/peers.json --docs docs/peers.md --check

The extra `bench` brings TorchOpt and curvlinops. Betty and BOAT run beside torch 2.15 on Python 3.11 too but do not
install by themselves: pip from 24.1 on refuses Betty's metadata, and BOAT asks for numpy 1.26 at most (it works with
newer ones). A package that is missing or fails is a row that says so. `--quick` takes a smaller network and fewer
repeats.

Measured: the ridge hypergradient against its closed form (float64); the BiSSL-shaped system [I + H/10.001] x = v
(float32 against a converged float64 solve): time in plain gradients over the same batches, memory above that of the
gradient, writes of BatchNorm's running statistics; and three small systems that show what a package says when things go
wrong.
"""

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from benchmarks import measuring, pages
from benchmarks.peers.adapters import KEPT, METHODS, Answer, Method, installed, ours
from benchmarks.peers.cases import Case, Variables, bissl_shaped, quadratic, ridge
from bilevel import CG

RIDGE_ITERATIONS = (40, 200)
SYSTEM_ITERATIONS, REPEATS = 5, 5
SYSTEM = {"width": 32, "batches": 5, "size": 64, "steps": 40}
QUICK_SYSTEM = {"width": 8, "batches": 2, "size": 16, "steps": 30}
Figures = dict[str, Any]


def relative(value: Variables, exact: Variables) -> float:
    x, reference = (torch.cat([leaf.reshape(-1).double() for leaf in leaves]) for leaves in (value, exact))
    return float((x - reference).norm() / reference.norm())


def attempt(run: Callable[[], Answer]) -> tuple[Answer | None, list[str]]:
    """The answer, and all that was said: warnings of its own, its status, or the error it stopped with."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            answer = run()
        except Exception as error:
            return None, [f"{type(error).__name__}: {error}"]
    own = [str(w.message) for w in caught if not issubclass(w.category, (FutureWarning, DeprecationWarning))]
    return answer, [text.splitlines()[0] for text in dict.fromkeys(own) if not text.startswith("Using backward()")]


def measure_ridge(methods: Sequence[Method]) -> list[Figures]:
    case, exact = ridge()
    rows = []
    for method in methods:
        for iterations in RIDGE_ITERATIONS:
            answer, said = attempt(lambda m=method, n=iterations: m.run(case, n))
            error = None if answer is None else relative(answer.value, (exact,))
            rows.append({"method": method.name, "iterations": iterations, "error": error, "said": said})
    return rows


def probes() -> dict[str, tuple[Case, Tensor | None]]:
    """Small systems: A = I, an indefinite A, and a NaN in the data."""
    tensor = [torch.tensor(values, dtype=torch.float64) for values in ([0.0] * 6, [-3.0, 0.0, 1.0, 2.0, 3.0, 4.0])]
    with_nan = torch.tensor([float("nan"), 0.0, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    return {
        "A = I": quadratic(tensor[0]),
        "indefinite": quadratic(tensor[1]),
        "NaN in the data": (quadratic(with_nan)[0], None),
    }


def measure_probes(methods: Sequence[Method]) -> list[Figures]:
    """What three iterations give, whether the result is finite and what is said of it."""
    rows = []
    for name, (case, exact) in probes().items():
        for method in methods:
            answer, said = attempt(lambda m=method, c=case: m.run(c, 3))
            row: Figures = {"probe": name, "method": method.name, "said": said, "raised": answer is None}
            if answer is not None:
                finite = all(bool(leaf.isfinite().all()) for leaf in answer.value)
                error = relative(answer.value, (exact,)) if exact is not None and finite else None
                row |= {"finite": finite, "error": error, "status": answer.status, "residual": answer.residual}
            rows.append(row)
    return rows


def statistics_writes(before: Case, after: Case) -> float:
    """Updates of the running statistics between two copies of a case, for each BatchNorm layer."""
    counts = [
        [float(buffer) for name, buffer in case.module.named_buffers() if name.endswith("num_batches_tracked")]
        for case in (before, after)
    ]
    return sum(b - a for a, b in zip(*counts, strict=True)) / len(counts[0])


def gradient(case: Case) -> None:
    """A plain gradient of the data loss, batch by batch."""
    y = [leaf.requires_grad_() for leaf in case.lower]
    for batch in case.batches:
        torch.autograd.grad(case.data_loss(y, batch), y)


def measure_system(methods: Sequence[Method], *, quick: bool, device: torch.device) -> Figures:
    case = bissl_shaped(**(QUICK_SYSTEM if quick else SYSTEM))
    case = case.to(device)
    exact = ours(lambda _: CG(200, 1e-10), KEPT)(case.to(torch.float64), 0)
    if exact.status != "CONVERGED":
        raise RuntimeError(f"the reference solve did not converge ({exact.status}); the system is not fit for this")
    rows: list[Figures] = []
    functions: dict[str, Callable[[], object]] = {"gradient": lambda: gradient(case)}
    for method in methods:
        copy = case.copied()
        answer, said = attempt(lambda m=method, c=copy: m.run(c, SYSTEM_ITERATIONS))
        row: Figures = {"method": method.name, "said": said, "error": None}
        if answer is not None:
            functions[method.name] = silent(lambda m=method: m.run(case, SYSTEM_ITERATIONS))
            row |= {"error": relative(answer.value, exact.value), "status": answer.status, "products": answer.products}
            row["statistics_writes"] = statistics_writes(case, copy)
        rows.append(row)
    base = measuring.peak_memory(functions["gradient"], device)
    # Every method has had its first call already.
    timings = measuring.interleaved(functions, 2 if quick else REPEATS, warm_up=0)
    for row in rows:
        if row["method"] in functions:
            row["gradients"] = timings[row["method"]].over(timings["gradient"]).record()
            row["memory"] = measuring.peak_memory(functions[row["method"]], device) - base
    return {
        "parameters": sum(leaf.numel() for leaf in case.upper),
        "batches": len(case.batches),
        "batch_size": len(case.batches[0][0]) // 2,
        "iterations": SYSTEM_ITERATIONS,
        "repeats": len(timings["gradient"].samples),
        "reference": {"status": exact.status, "residual": exact.residual},
        "gradient_seconds": timings["gradient"].record(),
        "gradient_memory": base,
        "rows": rows,
    }


def silent(run: Callable[[], object]) -> Callable[[], object]:
    """Without the warnings that `attempt` has already kept."""

    def wrapped() -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run()

    return wrapped


def measure(*, quick: bool, device: torch.device) -> Figures:
    present = [method for method in METHODS if installed(method.distribution) is not None]
    return {
        "quick": quick,
        "environment": measuring.environment(device),
        "methods": [{"name": m.name, "version": installed(m.distribution), "choices": m.choices} for m in METHODS],
        "ridge": measure_ridge(present),
        "probes": measure_probes(present),
        "system": measure_system(present, quick=quick, device=device),
    }


def missing(figures: Figures) -> list[str]:
    return [method["name"] for method in figures["methods"] if method["version"] is None]


def failed(row: Figures) -> str:
    """What a package that gave no answer said."""
    return f"failed: {row['said'][0].split(':')[0]}"


def _error(row: Figures) -> str:
    if row["error"] is None:
        return failed(row)
    return "NaN" if row["error"] != row["error"] else pages.number(row["error"])


def ridge_table(figures: Figures) -> tuple[list[str], list[list[str]]]:
    rows = [
        [name, *(_error(row) for row in figures["ridge"] if row["method"] == name)]
        for name in dict.fromkeys(row["method"] for row in figures["ridge"])
    ]
    rows += [[name, "not installed", ""] for name in missing(figures)]
    return ["", *(f"{n} iterations" for n in RIDGE_ITERATIONS)], rows


def system_table(figures: Figures) -> tuple[list[str], list[list[str]]]:
    rows = []
    for row in figures["system"]["rows"]:
        if row["error"] is None:
            rows.append([row["method"], failed(row), "", "", "", ""])
            continue
        time = row["gradients"]
        products = "not said" if row["products"] is None else str(row["products"])
        spread = f"{time['median']:.1f} ({time['q1']:.1f} to {time['q3']:.1f})"
        memory, writes = f"{row['memory'] / 2**20:.0f} MiB", f"{row['statistics_writes']:g}"
        rows.append([row["method"], spread, _error(row), products, memory, writes])
    rows += [[name, "not installed", "", "", "", ""] for name in missing(figures)]
    header = ["", "time in gradients (quartiles)", "relative error", "products", "memory above a gradient"]
    return [*header, "statistics written, a layer"], rows


def _outcome(row: Figures) -> str:
    """The error, and what was said of it: a status, a warning or an exception; "silent" where nothing was."""
    if row["raised"]:
        return f"raises {row['said'][0].split(':')[0]}"
    if row["status"]:
        status = row["status"].lower().replace("_", " ")
        return status if row["error"] is None else f"error {pages.number(row['error'])}, {status}"
    value = "finite" if row["error"] is None else f"error {pages.number(row['error'])}"
    return f"{value if row['finite'] else 'NaN'}, {'warns' if row['said'] else 'silent'}"


def probe_table(figures: Figures) -> tuple[list[str], list[list[str]]]:
    names = list(dict.fromkeys(row["probe"] for row in figures["probes"]))
    rows = []
    for method in dict.fromkeys(row["method"] for row in figures["probes"]):
        own = [row for row in figures["probes"] if row["method"] == method]
        reports = "yes" if any(row.get("residual") is not None for row in own) else "no"
        rows.append([method, *(_outcome(row) for row in own), reports])
    rows += [[name, "not installed", *[""] * len(names)] for name in missing(figures)]
    return ["", *names, "returns a residual"], rows


def choices_table(figures: Figures) -> tuple[list[str], list[list[str]]]:
    rows = [[m["name"], m["version"] or "not installed", m["choices"]] for m in figures["methods"]]
    return ["", "version", "what was chosen"], rows


def tables(figures: Figures) -> dict[str, str]:
    """Every text of the page by the name in its markers."""
    made = {"ridge": ridge_table, "system": system_table, "probes": probe_table, "choices": choices_table}
    texts = {f"peers-{name}": pages.table(*make(figures)) for name, make in made.items()}
    return {"peers-conditions": pages.conditions(figures), "peers-setting": setting(figures["system"]), **texts}


def setting(system: Figures) -> str:
    return (
        f"{system['parameters']:,} parameters, {system['batches']} batches of {system['batch_size']} pairs, "
        f"{system['iterations']} iterations, {system['repeats']} repeats. One gradient took "
        f"{pages.number(system['gradient_seconds']['median'])} s and {system['gradient_memory'] / 2**20:.0f} MiB."
    )


def main(arguments: list[str] | None = None) -> int:
    parser = measuring.parser(__doc__)
    parser.add_argument("--from", type=Path, dest="source", help="take figures from this file instead of measuring")
    parser.add_argument("--docs", type=Path, help="put the tables between the markers of this page")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the page differs")
    options = parser.parse_args(arguments)
    if options.check and not options.docs:
        parser.error("--check needs --docs")
    measuring.use_threads(options.threads)
    kept: Path | None = options.source
    figures = (
        json.loads(kept.read_text(encoding="utf-8")) if kept else measure(quick=options.quick, device=options.device)
    )
    measuring.write_json(options.json, figures)
    if options.docs:
        return pages.update(options.docs, tables(figures), check=options.check)
    measuring.show("Ridge: relative error of the hypergradient", *ridge_table(figures))
    measuring.show("The BiSSL-shaped system", *system_table(figures))
    measuring.show("When things go wrong", *probe_table(figures))
    measuring.show("What was chosen", *choices_table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
