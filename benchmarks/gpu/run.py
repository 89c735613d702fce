"""What a GPU computes and how fast: tests on it, training steps, input pipeline, alternation, memory, in 8 minutes.

    make gpu
    python benchmarks/gpu/run.py --json runs/gpu/gpu.json --page runs/gpu/gpu.html
    python benchmarks/gpu/run.py --device cpu --quick --json benchmarks/results/gpu.json --docs docs/gpu.md

The last line rehearses all of it on a CPU in small sizes: every command and every test body runs, and its figures say
nothing of a GPU. The parts, each in a process of its own with a limit of time:

- ``tests``: those marked `gpu`; on a CPU the same bodies, marked `rehearsal`.
- ``pretext``: images a second of the pretext step and of the input pipeline, and peak memory (benchmarks/pretext.py),
  in float32, in TF32, and in bfloat16 with channels-last memory.
- ``files``: images a second and core that the host makes of JPEG files (benchmarks/loading/run.py).
- ``alternation``: an alternation of BiSSL against the plain training in it (benchmarks/alternation/run.py).

A part that fails or takes longer than its share of `--limit` is recorded as that, and the others go on. It ends with 1
where one did, and with 2 where the device is not there.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch.cuda import nccl

from benchmarks.gpu.page import html, markdown
from benchmarks.gpu.parts import Part, failed_tests, read_json, read_outcomes, run_part
from benchmarks.measuring import environment, parser, write_json
from benchmarks.pages import update

LIMIT = 470.0
"""Seconds for all parts together, of which each has a share."""
PRETEXT = {
    "pretext-float32": ("pretext step and input pipeline, float32", ()),
    "pretext-tf32": ("pretext step and input pipeline, TF32", ("--tf32",)),
    "pretext-bf16": ("pretext step and input pipeline, bfloat16, channels last", ("--bf16", "--channels-last")),
}
NAMES = ("tests", *PRETEXT, "alternation", "files")
SETTINGS = ("default", "two_batches", "identity")
"""Of the alternation, those of which a solve takes seconds."""
IMAGE = 16 * 2**20
"""Bytes of device memory that the pretext step may take for an image of a batch: twice what float32 takes on a CPU."""


def parts(device: torch.device, *, quick: bool, tests: Sequence[str]) -> list[Part]:
    """All parts for a device."""
    common = [f"--device={device}", *(["--quick"] if quick else [])]
    mark = "rehearsal" if device.type == "cpu" else "gpu"

    def pytest(file: Path) -> list[str]:
        chosen = [
            "-m",
            mark,
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            "-p",
            "benchmarks.gpu.outcomes",
            "--outcomes",
            str(file),
        ]
        return ["-m", "pytest", *tests, *chosen]

    def pretext(extra: Sequence[str], file: Path) -> list[str]:
        sizes = [] if quick or device.type == "cpu" else [f"--batch={pretext_batch(device)}", "--images=20000"]
        return ["benchmarks/pretext.py", *common, *sizes, "--repeats=5", *extra, f"--json={file}"]

    def files(file: Path) -> list[str]:
        # Files are decoded by the host, whatever the device.
        sizes = ["--quick"] if quick else ["--pictures=256", "--repeats=2"]
        return ["benchmarks/loading/run.py", "--only", "speed", *sizes, f"--json={file}"]

    def alternation(file: Path) -> list[str]:
        return ["benchmarks/alternation/run.py", *common, "--repeats=3", "--settings", *SETTINGS, f"--json={file}"]

    return [
        Part("tests", "tests", 0.36, pytest, read_outcomes, failed_tests),
        *(Part(name, title, 0.1, partial(pretext, extra), read_json) for name, (title, extra) in PRETEXT.items()),
        Part("alternation", "an alternation of BiSSL", 0.22, alternation, read_json),
        Part("files", "the host's reading of files", 0.12, files, read_json),
    ]


def pretext_batch(device: torch.device) -> int:
    """Images a step: the largest power of two up to 1024 that half of the device's memory holds."""
    room = torch.cuda.get_device_properties(device).total_memory // (2 * IMAGE)
    return max(16, min(1024, 1 << max(room, 1).bit_length() - 1))


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the code, the device's properties included."""
    found = environment(device)
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {
            "device_memory_mib": about.total_memory // 2**20,
            "multiprocessors": about.multi_processor_count,
            "compute_capability": f"{about.major}.{about.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, nccl.version())),
            "gpus": torch.cuda.device_count(),
        }
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.set_defaults(device=torch.device("cuda"))
    options.add_argument("--page", type=Path, help="write the figures here, as one HTML page")
    options.add_argument("--docs", type=Path, help="write the tables into this page of the documentation")
    options.add_argument("--limit", type=float, default=LIMIT, help=f"seconds for all parts together ({LIMIT:.0f})")
    options.add_argument("--tests", nargs="+", default=["tests"], help="folders and files of tests (default: tests)")
    options.add_argument(
        "--only", nargs="+", choices=NAMES, help="run these parts; keep what --json holds of the others"
    )
    options.add_argument("--from", type=Path, dest="kept", help="take kept figures instead of measuring")
    options.add_argument("--check", action="store_true", help="with --from and --docs: change nothing, compare")
    given = options.parse_args(arguments)
    if given.check and not (given.kept and given.docs):
        options.error("--check needs --from and --docs")
    record = read_json(given.kept) if given.kept else measured(options, given)
    write_json(given.json, record)
    if given.page:
        given.page.parent.mkdir(parents=True, exist_ok=True)
        given.page.write_text(html(record), encoding="utf-8")
    code = update(given.docs, {"gpu": markdown(record)}, check=given.check) if given.docs else 0
    return code or (0 if all(part["outcome"] == "ok" for part in record["parts"].values()) else 1)


def measured(options: argparse.ArgumentParser, given: argparse.Namespace) -> dict[str, Any]:
    """The record of all parts."""
    if given.device.type == "cuda" and not torch.cuda.is_available():
        options.error("--device: cuda was asked for, but torch sees no CUDA device; --device cpu --quick rehearses")
    keep = given.only and given.json and given.json.exists()
    found = dict(read_json(given.json)["parts"]) if keep else {}
    record = {"environment": machine(given.device), "quick": given.quick, "rehearsal": given.device.type == "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        every = parts(given.device, quick=given.quick, tests=given.tests)
        chosen = [part for part in every if given.only is None or part.name in given.only]
        shares = sum(part.share for part in chosen)
        for part in chosen:
            found[part.name] = run_part(part, Path(folder), part.share / shares * given.limit)
            told = found[part.name]
            print(f"{part.title}: {told['outcome']}, {told['seconds']:.0f} s{_because(told['message'])}", flush=True)
    return {**record, "parts": {name: found[name] for name in NAMES if name in found}}


def _because(message: str | None) -> str:
    return f" ({message})" if message else ""


def _stop(*_: object) -> NoReturn:
    """On SIGTERM: through the blocks that end a part's processes."""
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main())
