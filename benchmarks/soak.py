"""Kill a run of the recipe again and again, resume it each time, and compare it with one that nothing disturbs.

    python benchmarks/soak.py --kills 20 --output benchmarks/results/soak.json -- --preset digits
    python benchmarks/soak.py --kills 20 --ranks 2 --output benchmarks/results/soak_ranks.json -- --preset digits

SIGKILL comes at random moments over the whole run, drawn by the seed from the progress of the undisturbed one. Weights
of every stage must then be equal byte for byte, results and events but for the seconds in them. With several ranks one
of them is killed, and the others must end by themselves with the exit code that says so.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.measuring import free_port
from recipes.bissl.commands.main import main as run_recipe
from recipes.experiment.artifacts import WEIGHTS
from recipes.experiment.folder.run_folder import CHECKPOINTS, METRICS, RESULTS

POLL = 0.002
"""Seconds between two looks at a run's progress."""

TIMES = {"seconds", "waiting"}
"""Fields of events and results that measure time."""


def soak(arguments: Sequence[str], kills: int, seed: int, folder: Path, ranks: int = 1) -> dict[str, Any]:
    """Figures of one soak with the recipe's `arguments`, whose two runs are made in `folder` by so many `ranks`.

    Raises:
        RuntimeError: a run ended otherwise than asked for.
    """
    whole, disturbed = folder / "whole", folder / "disturbed"
    began = time.perf_counter()
    _finish(start_ranks(arguments, whole, ranks))
    seconds = time.perf_counter() - began
    lines, draws = _lines(whole), random.Random(seed)
    points = sorted(draws.randrange(lines) for _ in range(kills))
    began, killed = time.perf_counter(), []
    for point in points:
        processes = start_ranks(arguments, disturbed, ranks)
        while _lines(disturbed) < point and any(process.is_alive() for process in processes):
            time.sleep(POLL)
        # Anywhere within the step, not only after an event's line.
        time.sleep(draws.uniform(0.0, seconds / lines))
        victim = draws.randrange(ranks)
        processes[victim].kill()
        codes = join_all(processes)
        newest = _newest(disturbed)
        killed.append({"events": _lines(disturbed), "rank": victim, "ended_by": codes, "newest": newest})
    _finish(start_ranks(arguments, disturbed, ranks))
    return {
        "arguments": list(arguments),
        "seed": seed,
        "ranks": ranks,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "kills": sum(kill["ended_by"][kill["rank"]] == -signal.SIGKILL for kill in killed),
        "others_ended_by": dict(Counter(code for kill in killed for code in _others(kill))),
        "killed": killed,
        "seconds_undisturbed": seconds,
        "seconds_with_kills": time.perf_counter() - began,
        "stages": len(_weights(whole)),
        "weights_equal": _weights(whole) == _weights(disturbed),
        "results_equal": _results(whole) == _results(disturbed),
        "events_equal": _events(whole) == _events(disturbed),
    }


def passed(figures: dict[str, Any]) -> bool:
    """Whether the disturbed run equals the other one."""
    return all(figures[name] for name in ("weights_equal", "results_equal", "events_equal"))


def main() -> int:
    """Run the soak that the command line asks for; exit code 1 where the runs differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of each run (default: 1)")
    parser.add_argument("--output", type=Path, default=None, metavar="FILE", help="JSON file of the figures")
    parser.add_argument("run", nargs="*", metavar="OPTION", help="options of run.py, after --")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = soak(["--threads=1", *given.run], given.kills, given.seed, Path(folder), given.ranks)
    text = json.dumps(figures, indent=1)
    print(text)
    if given.output is not None:
        given.output.write_text(text + "\n", encoding="utf-8")
    return 0 if passed(figures) else 1


def start_ranks(arguments: Sequence[str], folder: Path, ranks: int) -> list[BaseProcess]:
    """The processes of one run of the recipe into `folder`, resumed where it is there."""
    # From a process that only has imported: a kill then falls into the run, not into the imports.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([run_recipe.__module__, "torchvision", "scipy.stats"])
    command, port = [*arguments, f"--output-dir={folder}", "--resume"], free_port()
    processes = []
    for rank in range(ranks):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        processes.append(server.Process(target=_run, args=(command, environment)))
    for process in processes:
        process.start()
    return processes


def join_all(processes: Sequence[BaseProcess], timeout: float | None = None) -> list[int | None]:
    """Their exit codes, None for one that has not ended in time."""
    until = None if timeout is None else time.monotonic() + timeout
    for process in processes:
        process.join(None if until is None else max(0.0, until - time.monotonic()))
    return [process.exitcode for process in processes]


def _run(arguments: list[str], environment: dict[str, int]) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout = nowhere
        sys.exit(run_recipe(arguments))


def _finish(processes: Sequence[BaseProcess]) -> None:
    codes = join_all(processes)
    if any(codes):
        raise RuntimeError(f"a run that nobody disturbed ended with the exit codes {codes}")


def _others(kill: dict[str, Any]) -> list[int]:
    return [code for rank, code in enumerate(kill["ended_by"]) if rank != kill["rank"]]


def _lines(folder: Path) -> int:
    path = folder / METRICS
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _newest(folder: Path) -> str | None:
    """The newest checkpoint, as stage and step."""
    found = sorted(folder.glob(f"{CHECKPOINTS}/*/step-*.json"), key=lambda path: path.stat().st_mtime)
    return f"{found[-1].parent.name.partition('-')[0]} {int(found[-1].stem.removeprefix('step-'))}" if found else None


def _weights(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in folder.rglob(WEIGHTS)}


def _results(folder: Path) -> Any:
    return _timeless(json.loads((folder / RESULTS).read_text(encoding="utf-8")))


def _events(folder: Path) -> list[Any]:
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    return [_timeless(json.loads(line)) for line in lines]


def _timeless(value: Any) -> Any:
    """The same without the fields that measure time."""
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in TIMES}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main())
