"""What saving and the launcher cost: seconds that a checkpoint blocks training, its share of a run, torchrun's price.

    taskset -c 1 python benchmarks/overhead.py --json benchmarks/results/overhead.json --docs docs/reliability.md

- ``states``: where a stage of a run makes a checkpoint, it is made again and again, in turn with a plain write of as
  many bytes (and of a manifest) into the same folder: open, write, fsync, rename. Nothing is computed in between.
- ``share``: one whole run of the default preset with the seconds of every save added up.
- ``launcher``: a shorter run, alone and as the only rank of torchrun, in turn: seconds of the process from its start to
  its end, of the processor, and those that the run itself reports for its stages.

Everything in one thread. With ``--parts`` the others stay as they are in the JSON file; none after it measures nothing.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.measuring import (
    Timing,
    children_processor_seconds,
    environment,
    environment_alone,
    free_port,
    interleaved,
    parser,
    show,
    use_threads,
    write_json,
)
from benchmarks.pages import conditions, table, update
from bilevel import Checkpointing
from bilevel.checkpoint import save_checkpoint
from recipes.bissl.commands.main import main as run_recipe
from recipes.experiment.folder.run_folder import RESULTS

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "recipes" / "bissl" / "run.py"
FEW_STEPS = (
    *("--threads=1", "--seeds=1", "--arms=bissl,baseline"),
    *("--pretext.epochs=2", "--pretext.warmup-epochs=1", "--pretext.checkpoint-every=1", "--head.epochs=4"),
    *("--bissl.alternations=2", "--bissl.lower-steps=2", "--bissl.upper-steps=1", "--bissl.checkpoint-every=1"),
    *("--bissl.lower-warmup-epochs=0", "--finetune.epochs=4", "--finetune.checkpoint-every=1"),
)
NETS = {"digits preset": (), "digits preset with a ResNet-18": ("--model.backbone=resnet18", "--pretext.batch-size=64")}
SHORT = ("--threads=1", "--seeds=1", "--pretext.epochs=8", "--bissl.alternations=2", "--finetune.epochs=20")
TORCHRUN = ("torch.distributed.run", "--nproc-per-node=1", "--master-addr=127.0.0.1")

PARTS = ("states", "share", "launcher")
KINDS = {
    "whole": "the process, from start to end",
    "processor": "the processor",
    "stages": "training, as the run reports",
}

Save = Callable[[], object]


@contextmanager
def saves_through(watch: Callable[[str, Path, Save], None]) -> Iterator[None]:
    """Every checkpoint of the recipe goes through ``watch(stage, folder, save)``, which calls `save`.

    What `save` takes is what training waits for: the states of all parts, and their way to the disk.
    """
    first, others = save_checkpoint, Checkpointing.on_interrupt

    def see(folder: Path, save: Save) -> None:
        watch(folder.name.rpartition("-")[0], folder, save)

    with (
        patch(
            "bilevel.training.engine.save_checkpoint", lambda folder, *what: see(folder, lambda: first(folder, *what))
        ),
        patch.object(Checkpointing, "on_interrupt", lambda self, it: see(self.directory, lambda: others(self, it))),
    ):
        yield


def plain_write(folder: Path, content: bytes, manifest: bytes) -> None:
    """The least that brings a checkpoint's bytes and its manifest to the disk, each whole or not there."""
    for name, part in (("plain.pt", content), ("plain.json", manifest)):
        with (folder / f"{name}.tmp").open("wb") as file:
            file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, folder / name)


def compare(folder: Path, save: Save, repeats: int) -> dict[str, Any]:
    """Seconds of `save`, of a plain write of the same bytes, and their difference, repeat by repeat."""
    save()
    manifest = max(folder.glob("step-*.json"))
    content = (folder / json.loads(manifest.read_bytes())["file"]).read_bytes()
    functions = {"blocked": save, "plain": lambda: plain_write(folder, content, manifest.read_bytes())}
    times = interleaved(functions, repeats)
    pairs = zip(times["blocked"].samples, times["plain"].samples, strict=True)
    difference = Timing(tuple(blocked - plain for blocked, plain in pairs))
    figures = {name: timing.record() for name, timing in {**times, "difference": difference}.items()}
    return {"bytes": len(content), "repeats": repeats, **figures}


def states(options: Sequence[str], repeats: int) -> dict[str, Any]:
    """`compare` in every stage of one short run, at the first checkpoint that is after a step."""
    seen: dict[str, int] = {}
    found: dict[str, Any] = {}

    def watch(stage: str, folder: Path, save: Save) -> None:
        save()
        seen[stage] = seen.get(stage, 0) + 1
        if seen[stage] == 2:
            found[stage] = compare(folder, save, repeats)

    with saves_through(watch):
        run_quietly(options)
    return found


def share(options: Sequence[str]) -> dict[str, Any]:
    """What all saves of one run take of its time."""
    stages: dict[str, dict[str, float]] = {}

    def watch(stage: str, folder: Path, save: Save) -> None:
        began = time.perf_counter()
        save()
        row = stages.setdefault(stage, {"count": 0, "seconds": 0.0})
        row["count"] += 1
        row["seconds"] += time.perf_counter() - began

    began = time.perf_counter()
    with saves_through(watch):
        run_quietly(options)
    seconds = time.perf_counter() - began
    saving = sum(row["seconds"] for row in stages.values())
    return {"stages": stages, "saving": saving, "seconds": seconds, "share": saving / seconds}


def run_quietly(options: Sequence[str]) -> None:
    """One run of the recipe in this process.

    Raises:
        RuntimeError: it did not end with exit code 0.
    """
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        code = run_recipe([*options, f"--output-dir={folder}"])
    if code != 0:
        raise RuntimeError(f"run.py {' '.join(options)} ended with exit code {code}")


def launcher(program: Path, options: Sequence[str], pairs: int) -> dict[str, Any]:
    """Runs of `program` without and with torchrun, in turn: times from outside, and those in its results.json.

    Processor seconds are those of all processes of a run; other work on the machine disturbs them the least.
    """
    seen: dict[str, dict[str, list[float]]] = {kind: {"alone": [], "torchrun": []} for kind in KINDS}

    def start(name: str) -> None:
        starter = () if name == "alone" else ("-m", *TORCHRUN, f"--master-port={free_port()}")
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, *starter, str(program), *options, f"--output-dir={folder}"]
            began, used = time.perf_counter(), children_processor_seconds()
            # One thread, as torchrun sets it.
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment_alone())
            seen["whole"][name].append(time.perf_counter() - began)
            seen["processor"][name].append(children_processor_seconds() - used)
            results = json.loads((Path(folder) / RESULTS).read_text(encoding="utf-8"))
        seen["stages"][name].append(results["variants"]["bissl"]["seconds"])

    for _ in range(pairs):
        start("alone")
        start("torchrun")
    return {"options": list(options), "pairs": pairs, **{kind: against(**values) for kind, values in seen.items()}}


def against(alone: Sequence[float], torchrun: Sequence[float]) -> dict[str, Any]:
    """Both, and the second over and less the first, pair by pair."""
    ways = {"alone": Timing(tuple(alone)), "torchrun": Timing(tuple(torchrun))}
    more = Timing(tuple(b - a for a, b in zip(alone, torchrun, strict=True)))
    every = {**ways, "ratio": ways["torchrun"].over(ways["alone"]), "more": more}
    return {name: timing.record() for name, timing in every.items()}


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """Every table of the page."""
    states_header = ["checkpoint of", "stage", "MB", "blocks, ms", "plain write, ms", "difference, ms"]
    share_header = ["stage", "checkpoints", "seconds", "of the run"]
    launcher_header = ["seconds of", "alone", "torchrun", "more", "ratio"]
    return {
        "checkpoints": table(states_header, states_rows(figures)),
        "checkpoint share": table(share_header, share_rows(figures)),
        "launcher": f"{table(launcher_header, launcher_rows(figures))}\n\n{conditions(figures)}",
    }


def states_rows(figures: Mapping[str, Any]) -> list[list[str]]:
    rows = [(net, stage, row) for net, stages in figures["states"].items() for stage, row in stages.items()]
    timed = ("blocked", "plain", "difference")
    return [
        [net, stage, f"{row['bytes'] / 1e6:.1f}", *(spread(row[name], 1e3, 1) for name in timed)]
        for net, stage, row in rows
    ]


def share_rows(figures: Mapping[str, Any]) -> list[list[str]]:
    whole = figures["share"]
    rows = {**whole["stages"], "all": {"count": sum(r["count"] for r in whole["stages"].values())}}
    rows["all"]["seconds"] = whole["saving"]
    return [
        [name, str(row["count"]), f"{row['seconds']:.2f}", f"{100.0 * row['seconds'] / whole['seconds']:.2f} %"]
        for name, row in rows.items()
    ]


def launcher_rows(figures: Mapping[str, Any]) -> list[list[str]]:
    ways = {"alone": 2, "torchrun": 2, "more": 2, "ratio": 3}
    return [
        [said, *(spread(figures["launcher"][kind][name], 1.0, digits) for name, digits in ways.items())]
        for kind, said in KINDS.items()
    ]


def spread(row: Mapping[str, float], unit: float, digits: int) -> str:
    """Median and quartiles in a unit."""
    median, low, high = (f"{row[name] * unit:.{digits}f}" for name in ("median", "q1", "q3"))
    return f"{median} ({low} to {high})"


def measure(parts: Sequence[str], *, quick: bool, pairs: int) -> dict[str, Any]:
    """The figures of some of `PARTS`."""
    repeats, whole = (2, FEW_STEPS) if quick else (15, ("--threads=1",))
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "states": lambda: {net: states([*FEW_STEPS, *options], repeats) for net, options in NETS.items()},
        "share": lambda: share(whole),
        "launcher": lambda: launcher(RUN, FEW_STEPS if quick else SHORT, 1 if quick else pairs),
    }
    return {part: measures[part]() for part in PARTS if part in parts}


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--pairs", type=int, default=5, help="runs alone and by torchrun (default: 5 each)")
    options.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS, help="which to measure")
    options.add_argument("--docs", type=Path, help="write the tables into this page")
    arguments = options.parse_args()
    path, some = arguments.json, set(arguments.parts) != set(PARTS)
    figures = json.loads(path.read_text(encoding="utf-8")) if some and path is not None and path.exists() else {}
    if arguments.parts:
        use_threads(1)
        figures |= {"quick": arguments.quick, "environment": environment()}
        figures |= measure(arguments.parts, quick=arguments.quick, pairs=arguments.pairs)
        write_json(path, figures)
    if missing := [part for part in PARTS if part not in figures]:
        options.error(f"--parts: nothing is kept of {', '.join(missing)}; measure them too")
    show("Checkpoints", ["of", "stage", "MB", "blocks", "plain", "difference (ms)"], states_rows(figures))
    show("A whole run", ["stage", "checkpoints", "seconds", "share"], share_rows(figures))
    show("Launcher", ["seconds of", "alone", "torchrun", "more", "ratio"], launcher_rows(figures))
    return 0 if arguments.docs is None else update(arguments.docs, tables(figures), check=False)


if __name__ == "__main__":
    sys.exit(main())
