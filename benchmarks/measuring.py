"""What every benchmark needs: the machine, interleaved timings, peak memory, kept figures, the common options."""

import argparse
import json
import os
import resource
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bilevel import __version__
from bilevel.compare import Timing as Timing
from bilevel.compare import interleaved as interleaved
from bilevel.compare import machine
from bilevel.compare import synchronize as synchronize


def peak_memory(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Bytes that tensors take up at the most while `function` runs, above those that exist when it starts.

    On the CPU it is counted from the allocations that the profiler records, which neither the operating system's page
    cache nor what the allocator keeps for later disturbs; scratch space inside a kernel is not in it.
    """
    if torch.device(device).type == "cuda":
        synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        function()
        synchronize()
        return torch.cuda.max_memory_allocated(device) - start
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda moment: moment[0]):
        held += change
        peak = max(peak, held)
    return peak


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {"bilevel": __version__, **machine(device)}


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options all benchmarks share; `description` is the module's docstring, of which the first line is shown."""
    options = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    options.add_argument("--json", type=Path, help="write the figures here")
    options.add_argument("--quick", action="store_true", help="smaller and fewer runs, for a try")
    options.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    options.add_argument("--threads", type=int, help="torch threads on the CPU (default: torch's own choice)")
    return options


def use_threads(threads: int | None) -> None:
    """Apply ``--threads``."""
    if threads is not None:
        torch.set_num_threads(threads)


def write_json(path: Path | None, payload: Mapping[str, Any]) -> None:
    """Keep the figures; without a path nothing is written."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(payload, indent=1) + "\n", encoding="utf-8")


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    table = Table(*header, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def children_processor_seconds() -> float:
    """Processor time of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def environment_alone(threads: int = 1) -> dict[str, str]:
    """This process's environment for a child with so many threads and without a launcher's variables."""
    ours = {name: value for name, value in os.environ.items() if name not in {"WORLD_SIZE", "RANK", "LOCAL_RANK"}}
    return {**ours, "OMP_NUM_THREADS": str(threads)}


def free_port() -> int:
    """A port of the loopback interface that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]
