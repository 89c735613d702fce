"""Hypergradients for the hyperparameters of two networks: terms, solvers, lower steps, modes, training by them.

    pip install -e ".[timm,demo]"
    python benchmarks/networks/run.py --threads 1 --json benchmarks/results/networks.json --docs docs/networks.md
    python benchmarks/networks/run.py --from benchmarks/results/networks.json --docs docs/networks.md --check

The lower level is trained by Adam on all images in every step. The reference is the derivative of F after further such
steps, by reverse mode through them, which differences of those trainings are held against.
"""

import json
import sys
from pathlib import Path
from typing import Any

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks import measuring, pages
from benchmarks.networks import tables
from benchmarks.networks.measure import measure
from benchmarks.networks.problems import NETWORKS, QUICK, SIZES

SEEDS, ALTERNATIONS = 3, 12


def figures_of(*, quick: bool) -> dict[str, Any]:
    sizes = dict.fromkeys(NETWORKS, QUICK) if quick else SIZES
    seeds, alternations = (1, 1) if quick else (SEEDS, ALTERNATIONS)
    described = "; ".join(
        f"{name}: {s.images} images, {s.steps} lower steps, {s.further} further ones, n = {s.iterations}"
        for name, s in sizes.items()
    )
    return {
        "quick": quick,
        "environment": measuring.environment(),
        "settings": f"{seeds} seeds. {described}.",
        "networks": measure(NETWORKS, sizes, seeds=seeds, alternations=alternations),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = measuring.parser(__doc__)
    parser.add_argument("--from", type=Path, dest="source", help="take figures from this file instead of measuring")
    parser.add_argument("--docs", type=Path, help="put the tables between the markers of this page")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the page differs")
    options = parser.parse_args(arguments)
    if options.check and not options.docs:
        parser.error("--check needs --docs")
    if options.device.type != "cpu":
        parser.error("the networks are trained on the CPU: they are too small for an accelerator")
    measuring.use_threads(options.threads)
    kept: Path | None = options.source
    figures = json.loads(kept.read_text(encoding="utf-8")) if kept else figures_of(quick=options.quick)
    measuring.write_json(options.json, figures)
    texts = tables.tables(figures)
    if options.docs:
        return pages.update(options.docs, texts, check=options.check)
    for name, text in texts.items():
        print(f"\n{name}\n\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
