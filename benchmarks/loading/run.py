"""Loading of images: speed beside lightly, what is hidden behind computing, and memory.

    python benchmarks/loading/run.py --threads 1 --json benchmarks/results/loading.json --docs docs/images.md

JPEGs of 500 x 375 px are made of scikit-learn's two photographs, in a temporary folder. Everything is measured in turns
within one run, by the clock and by processor time: on a busy machine the ratios by processor time are the ones to read.

- ``speed``: lightly's two views of BYOL in a DataLoader with two workers; two workers' crops of the same policy alone;
  and with the colour part in this process, on the same cores; from files, from the disk cache, and in memory.
- ``cores``: how many would feed 15,000 images a second, from the images that a busy core makes in a second.
- ``sleeping``: a step's time over the longer of loading and consuming, where the consumer sleeps.
- ``alternation``: the recipe's bilevel stage on a streamed folder: its time over the longer of loading and computing.
- ``memory``: bytes a file of a listing; proportional set sizes with streaming; peak memory of evaluation.
"""

import json
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torchvision

from benchmarks.loading.memory import measured, streamed, write_empty, write_links
from benchmarks.loading.overlap import alternation, sleeping
from benchmarks.loading.photographs import write_photographs
from benchmarks.loading.sides import VIEWS, Cost, crops_alone, lightly_side, measure, whole
from benchmarks.measuring import environment, parser, show, use_threads, write_json
from benchmarks.pages import conditions, table, update
from recipes.vision.pictures.memory import read_all
from recipes.vision.pipeline.picture_cache import PictureCache
from recipes.vision.pipeline.workers import Workers
from recipes.vision.sources.loading import load_pretext

Figures = Mapping[str, Any]

KEYS = {"speed": "speed", "overlap": "sleeping", "memory": "memory"}
PARTS = tuple(KEYS)
WANTED = 15_000
"""Images a second that a GPU would take."""
BASE = "lightly"
FULL, QUICK = (
    {"pictures": 512, "repeats": 5, "listing": 1_000_000, "streaming": (1_000, 20_000), "evaluation": (200, 5_000)},
    {"pictures": 32, "repeats": 1, "listing": 2_000, "streaming": (100, 400), "evaluation": (32, 96)},
)


def summary(costs: Mapping[str, Sequence[Cost]]) -> dict[str, Any]:
    """Medians of each side, and of its ratios to lightly's of the same repeat."""
    found = {}
    for name, each in costs.items():
        row: dict[str, Any] = {
            key: statistics.median(cost.record()[key] for cost in each)
            for key in ("images_per_second", "images_per_core_second")
        }
        if BASE in costs:
            for key in tuple(row):
                ratios = [a.record()[key] / b.record()[key] for a, b in zip(each, costs[BASE], strict=True)]
                row[f"{key}_ratio"] = statistics.median(ratios)
        found[name] = row
    return found


def measure_speed(folder: Path, place: Path, repeats: int, batch: int) -> tuple[dict[str, Any], str | None]:
    """All sides' speeds, and why lightly is left out, if it is."""
    files = load_pretext(f"folder:{folder}", root="", download=False, evaluated=False, storage="stream").images
    cached = PictureCache(place / "cache", lambda line: None).kept(files, VIEWS, "photographs")
    sources = {"files": files, "disk cache": cached, "memory": read_all(files)}
    workers, missing, sides = Workers(2), None, {}
    try:
        try:
            sides[BASE] = lightly_side(folder, 2, batch)
        except ImportError as error:
            missing = str(error)
            print(f"lightly is left out: {missing}")
        for name, images in sources.items():
            sides[f"{name}: crops"] = crops_alone(images, workers, batch)
            sides[f"{name}: whole"] = whole(images, workers, batch)
        return summary(measure(sides, repeats)), missing
    finally:
        workers.close()


def measure_memory(place: Path, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes of listings, streaming and evaluation."""
    pictures = write_photographs(place / "few", 16)
    found: dict[str, Any] = {"listing": measured("listing", write_empty(place / "empty", sizes["listing"]))}
    for what in ("streaming", "evaluation"):
        found[what] = [measured(what, write_links(place / f"{what}{count}", pictures, count)) for count in sizes[what]]
    return found


def cores(speed: Figures) -> dict[str, int]:
    """Cores that make `WANTED` images a second, by side."""
    return {name: math.ceil(WANTED / row["images_per_core_second"]) for name, row in speed.items()}


def speed_table(figures: Figures) -> str:
    def ratio(row: Figures, key: str) -> str:
        return f"{row[key]:.2f}" if key in row else ""

    rows = [
        [
            name,
            f"{row['images_per_second']:.0f}",
            ratio(row, "images_per_second_ratio"),
            f"{row['images_per_core_second']:.0f}",
            ratio(row, "images_per_core_second_ratio"),
            f"{figures['cores'][name]}",
        ]
        for name, row in figures["speed"].items()
    ]
    header = ["way", "images/s", "of lightly's", "images/s and core", "of lightly's", f"cores for {WANTED:,} images/s"]
    versions = f"torchvision {figures['torchvision']}, {figures['pictures']} JPEGs, batches of {figures['batch']}"
    return f"{table(header, rows)}\n\n{versions}. {conditions(figures)}"


def overlap_table(figures: Figures) -> str:
    rows = [
        [
            f"sleeps {row['share']:g} times as long as loading takes",
            *(f"{1000 * row[key]:.0f} ms" for key in ("loading", "consuming", "step")),
            f"{row['ratio']:.2f}",
        ]
        for row in figures["sleeping"]
    ]
    one = figures["alternation"]
    rows.append(
        [
            "the bilevel stage, ResNet-tiny, one thread, one worker",
            *(f"{one[key]:.1f} s" for key in ("loading", "computing", "total")),
            f"{one['ratio']:.2f}",
        ]
    )
    return table(["consumer", "loading", "consuming", "together", "of the longer"], rows)


def memory_table(figures: Figures) -> str:
    memory, mib = figures["memory"], 2**20
    listing = memory["listing"]
    (few, many), (small, large) = memory["streaming"], memory["evaluation"]
    growth = [100 * (many[key] / few[key] - 1) for key in ("bytes", "without_files")]
    rows = [
        ["a listing, bytes a file", f"{listing['files']:,} files", f"{listing['bytes'] / listing['files']:.0f}"],
        *(
            ["streaming, all processes, MiB", f"{row['files']:,} pictures", f"{row['bytes'] / mib:.0f}"]
            for row in (few, many)
        ),
        ["streaming, growth", f"{few['files']:,} to {many['files']:,} pictures", f"{growth[0]:.1f}%"],
        ["the same without pages of files", f"{few['files']:,} to {many['files']:,} pictures", f"{growth[1]:.1f}%"],
        *(
            ["streaming, the largest worker, MiB", f"{row['files']:,} pictures", f"{row['worker'] / mib:.0f}"]
            for row in (few, many)
        ),
        *(
            ["evaluation, peak, MiB", f"{row['files']:,} pictures", f"{row['bytes'] / mib:.0f}"]
            for row in (small, large)
        ),
    ]
    return table(["what", "of", "memory"], rows)


def tables(figures: Figures) -> dict[str, str]:
    """Those of the page, by their markers; a part that was left out is said to be."""
    written = {"speed": speed_table, "overlap": overlap_table, "memory": memory_table}
    return {
        f"loading {part}": write(figures) if KEYS[part] in figures else "Not measured yet: run the command above."
        for part, write in written.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--docs", type=Path, help="write the tables into this page")
    options.add_argument("--only", nargs="+", choices=PARTS, help="measure these; keep what --json holds of the others")
    options.add_argument("--pictures", type=int, help=f"JPEGs of the speed (default: {FULL['pictures']})")
    options.add_argument("--repeats", type=int, help=f"of the speed (default: {FULL['repeats']})")
    options.add_argument("--from", type=Path, dest="kept", help="take kept figures instead of measuring")
    options.add_argument("--check", action="store_true", help="with --from and --docs: change nothing, compare")
    given = options.parse_args(arguments)
    if given.check and not (given.kept and given.docs):
        options.error("--check needs --from and --docs")
    if given.kept:
        figures = json.loads(given.kept.read_text(encoding="utf-8"))
    else:
        use_threads(given.threads)
        keep = given.only and given.json and given.json.exists()
        known = json.loads(given.json.read_text(encoding="utf-8")) if keep else {}
        asked = {name: value for name in ("pictures", "repeats") if (value := getattr(given, name)) is not None}
        figures = known | measure_parts(given.only or PARTS, given.quick, asked)
        write_json(given.json, figures)
    for name, text in tables(figures).items():
        if "|" not in text:
            print(text)
            continue
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]
        show(name, lines[0], lines[2:])
    return update(given.docs, tables(figures), check=given.check) if given.docs else 0


def measure_parts(parts: Sequence[str], quick: bool, asked: Mapping[str, int]) -> dict[str, Any]:
    """The figures of some parts; of the sizes those that were asked for stand instead of the usual ones."""
    sizes: dict[str, Any] = {**(QUICK if quick else FULL), **asked}
    count = sizes["pictures"]
    batch = count // 2
    figures: dict[str, Any] = {
        "environment": environment(),
        "quick": quick,
        "torchvision": torchvision.__version__,
        "pictures": count,
        "batch": batch,
    }
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        folder = write_photographs(place / "photographs", count)
        if "speed" in parts:
            figures["speed"], figures["missing"] = measure_speed(folder, place, sizes["repeats"], batch)
            figures["cores"] = cores(figures["speed"])
        if "overlap" in parts:
            steps, repeats = (1, 1) if quick else (6, 5)
            figures["sleeping"] = sleeping(streamed(folder), 1, batch // 4, steps, repeats)
            figures["alternation"] = alternation(folder, quick)
        if "memory" in parts:
            figures["memory"] = measure_memory(place, sizes)
    return figures


if __name__ == "__main__":
    sys.exit(main())
