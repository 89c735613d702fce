"""What several processes exchange in BiSSL's steps, counted and predicted, and how long that takes.

    python benchmarks/communication/run.py --json benchmarks/results/communication.json --docs docs/distributed.md
    python benchmarks/communication/run.py --from benchmarks/results/communication.json \
        --docs docs/distributed.md --check

Two processes of this machine talk through gloo over its loopback interface. The run fails where the calls that were
counted are not those of `communication_model`, kind by kind and byte by byte.
"""

import json
import multiprocessing
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.distributed as dist

from benchmarks import measuring
from benchmarks.communication import model as model
from benchmarks.communication.case import SHORT, Case, counted, recorded, sizes_of
from benchmarks.communication.tables import tables
from benchmarks.measuring import Timing
from benchmarks.pages import update
from recipes.experiment.ranks.processes import Launch, Ranks

RANKS = 2
MODES = ("synchronised", "local")
BATCH, LABELLED = 16, 8
DEADLINE = 900.0


def counts(batch_norm: str, *, whole: bool = True) -> dict[str, list[list[Any]]]:
    """Messages of each step on a small problem, as [kind, bytes, count]; with `whole` those of an alternation too.

    Raises:
        RuntimeError: they are not those that the model says.
    """
    case = Case(BATCH, LABELLED, batch_norm)
    with recorded() as calls:
        case.pretext_step()
    found = {"pretext step": counted(calls)}
    multiply = case.product()
    with recorded() as calls:
        multiply()
    found["product with A"] = counted(calls)
    if whole:
        found |= case.alternation()
    predicted = model.by_step(case.sizes, SHORT)
    for name, messages in found.items():
        if messages != predicted[name]:
            more, less = dict(messages - predicted[name]), dict(predicted[name] - messages)
            raise RuntimeError(f"{name}, BatchNorm {batch_norm}: {more} beyond what the model says, {less} missing")
    return {name: [[*key, count] for key, count in sorted(messages.items())] for name, messages in found.items()}


def reductions(quick: bool) -> list[dict[str, float]]:
    """Seconds of an all-reduce, by its bytes."""
    found = []
    for exponent in range(10, 19 if quick else 27, 2):
        tensor = torch.zeros(2**exponent // 4)
        timing = measuring.interleaved(
            {"all-reduce": lambda tensor=tensor: dist.all_reduce(tensor)}, 3 if quick else 40, warm_up=5
        )
        found.append({"bytes": 2**exponent, **timing["all-reduce"].record()})
    return found


def steps(quick: bool) -> list[dict[str, Any]]:
    """Seconds of a pretext step of the small problem, and those that it spends in collectives, waiting included."""
    found = []
    for batch_norm in MODES:
        for batch in (8, 16) if quick else (16, 64, 256):
            case = Case(batch, 4, batch_norm)
            whole, exchange = [], []
            for _ in range(4 if quick else 14):
                dist.barrier()
                with recorded() as calls:
                    began = time.perf_counter()
                    case.pretext_step()
                    whole.append(time.perf_counter() - began)
                exchange.append(sum(seconds for *_, seconds in calls))
            # The first steps fill caches.
            timing = {"step": Timing(tuple(whole[2:])), "exchange": Timing(tuple(exchange[2:]))}
            numbers = {name: value.record() for name, value in timing.items()}
            found.append({"batch_norm": batch_norm, "batch": batch, "sizes": asdict(case.sizes), **numbers})
    return found


def worker(rank: int, port: int, threads: int, quick: bool, path: str) -> None:
    torch.set_num_threads(threads)
    Ranks(Launch(rank, RANKS, rank, "127.0.0.1", port)).join(torch.device("cpu"), 100.0)
    figures = {
        "counts": {batch_norm: counts(batch_norm) for batch_norm in MODES},
        "reductions": reductions(quick),
        "steps": steps(quick),
    }
    if rank == 0:
        Path(path).write_text(json.dumps(figures), encoding="utf-8")
    dist.destroy_process_group()


def measure(threads: int, quick: bool) -> dict[str, Any]:
    """All figures, from processes of their own.

    Raises:
        RuntimeError: one of them failed, or they did not end.
    """
    port = measuring.free_port()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        processes = [
            context.Process(target=worker, args=(rank, port, threads, quick, str(path))) for rank in range(RANKS)
        ]
        deadline = time.monotonic() + DEADLINE
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(codes) or None in codes:
            raise RuntimeError(f"the processes ended with {codes}; None is one that did not end in {DEADLINE:g} s")
        figures = json.loads(path.read_text(encoding="utf-8"))
    paper = {
        batch_norm: [asdict(sizes_of("resnet18", ranks, 1024, 256, batch_norm)) for ranks in (2, 8, 64)]
        for batch_norm in MODES
    }
    return {"quick": quick, "environment": {**measuring.environment(), "threads": threads}, "paper": paper, **figures}


def main(arguments: list[str] | None = None) -> int:
    options = measuring.parser(__doc__)
    options.add_argument("--from", dest="source", type=Path, help="take the figures from here instead of measuring")
    options.add_argument("--docs", type=Path, help="put the tables between the markers of this page")
    options.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the page differs")
    given = options.parse_args(arguments)
    if given.check and not given.docs:
        options.error("--check needs --docs")
    if given.device.type != "cpu":
        options.error("--device: gloo's processes are measured on the CPU alone")
    if given.source:
        figures = json.loads(given.source.read_text(encoding="utf-8"))
    else:
        figures = measure(given.threads or 1, given.quick)
    measuring.write_json(given.json, figures)
    texts = tables(figures)
    for name, text in texts.items():
        print(f"{name}\n\n{text}\n")
    return update(given.docs, texts, check=given.check) if given.docs else 0


if __name__ == "__main__":
    raise SystemExit(main())
