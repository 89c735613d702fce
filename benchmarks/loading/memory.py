"""Memory of listings, of streaming and of evaluation, each measured in a fresh process.

    python benchmarks/loading/memory.py listing|streaming|evaluation FOLDER

prints one JSON object of bytes.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from benchmarks.loading.sides import VIEWS, descendants
from recipes.vision.pictures.base import Images
from recipes.vision.pipeline.loader import Loader
from recipes.vision.pipeline.stream import InOrder, PrefetchedStack, order_of
from recipes.vision.pipeline.workers import Workers
from recipes.vision.sources.loading import load_pretext
from recipes.vision.views.evaluation_view import EvalView

ROOT = Path(__file__).resolve().parents[2]
BATCH, STEPS, WORKERS = 64, 12, 2


def proportional(process: int, *kinds: str) -> int:
    """Bytes of memory that a process holds, what it shares with n processes counted as an n-th; of all kinds, or some.

    "Anon" and "Shmem" together are all but the pages of files, such as libraries, which processes of others share too.
    """
    text = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8")
    return sum(_line(text, f"Pss_{kind}") for kind in kinds) if kinds else _line(text, "Pss")


def _line(text: str, name: str) -> int:
    """Bytes in a line of /proc."""
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.M)
    assert found, "Linux writes this line"
    return int(found[1]) * 1024


def streamed(folder: Path) -> Images:
    return load_pretext(f"folder:{folder}", root="", download=False, evaluated=False, storage="stream").images


def listing(folder: Path) -> dict[str, int]:
    """Bytes that this process holds more of once the files are listed."""
    before = proportional(os.getpid(), "Anon")
    images = streamed(folder)
    return {"files": len(images), "bytes": proportional(os.getpid(), "Anon") - before}


def streaming(folder: Path) -> dict[str, int]:
    """After some batches: bytes of all processes together, and of one worker."""
    images, workers = streamed(folder), Workers(WORKERS)
    loader = Loader(images, VIEWS, workers)
    stack = PrefetchedStack(
        order_of(len(images), BATCH, seed=0),
        loader.begin,
        lambda begun, seed: loader.finish(begun)[0],
        loader.give_up,
        total=STEPS,
        room=loader.room,
    )
    for _ in range(STEPS):
        stack.next()
    below = descendants(os.getpid())
    processes = (os.getpid(), *below)
    found = {"files": len(images), "bytes": sum(map(proportional, processes))}
    found["without_files"] = sum(proportional(process, "Anon", "Shmem") for process in processes)
    found["worker"] = max(proportional(process, "Anon") for process in below)
    workers.close()
    return found


def evaluation(folder: Path) -> dict[str, int]:
    """The most that this process, which gets the inputs, has held."""
    images, workers = streamed(folder), Workers(1)
    loader = Loader(images, (EvalView(109, 96),), workers)
    for views, _ in InOrder(len(images), BATCH, loader.begin, loader.finish, loader.give_up):
        assert views[0].shape[1:] == (3, 96, 96)
    workers.close()
    return {"files": len(images), "bytes": _line(Path("/proc/self/status").read_text("utf-8"), "VmHWM")}


MEASURES = {"listing": listing, "streaming": streaming, "evaluation": evaluation}


def measured(what: str, folder: Path) -> dict[str, int]:
    """One of `MEASURES` of a folder, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(Path(__file__)), what, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{what} of {folder} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def write_empty(folder: Path, count: int) -> Path:
    """Empty files in two class folders, named as long as those of ImageNet."""
    for name in ("n01440764", "n01443537"):
        (folder / name).mkdir(parents=True)
    for index in range(count):
        (folder / ("n01440764", "n01443537")[index % 2] / f"ILSVRC2012_val_{index:08d}.JPEG").touch()
    return folder


def write_links(folder: Path, pictures: Path, count: int) -> Path:
    """`count` names of the few pictures below `pictures`."""
    originals = sorted(pictures.rglob("*.jpg"))
    for name in ("first", "second"):
        (folder / name).mkdir(parents=True)
    for index in range(count):
        os.link(originals[index % len(originals)], folder / ("first", "second")[index % 2] / f"{index:06d}.jpg")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=MEASURES)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(MEASURES[given.what](given.folder)))
