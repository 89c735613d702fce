"""Every solver on systems of every kind: error against products and against time, and what the pages say of it.

    python benchmarks/solvers/run.py --json benchmarks/results/solvers.json \
        --docs docs/choosing.md docs/outcomes.md --figure docs/_static/solvers.svg
    python benchmarks/solvers/run.py --from benchmarks/results/solvers.json \
        --docs docs/choosing.md docs/outcomes.md --check

The first command measures everything (a few minutes on two cores), keeps the figures, draws them and writes the tables
into the pages, each between its two markers. The second only compares pages with kept figures. `--quick` makes smaller
and fewer runs. Without `--docs` the tables are printed.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from benchmarks import measuring
from benchmarks.solvers import curves as solvers_curves
from benchmarks.solvers import network as solvers_network
from benchmarks.solvers import systems as solvers_systems
from benchmarks.solvers import tables as solvers_tables
from benchmarks.solvers import trajectory as solvers_trajectory
from bilevel.compare import SUCCESSIVE_HEADER, curves, curves_header, names, picture, successive


def measure(*, quick: bool, device: torch.device) -> dict[str, Any]:
    """Everything; on an accelerator the quadratic systems' curves run there, the small dense cases stay on the CPU."""
    settings = solvers_network.settings(quick=quick)
    spectra = solvers_network.spectra(settings["ReLU"])
    weights = solvers_network.WEIGHTS[:1] if quick else solvers_network.WEIGHTS
    return {
        "quick": quick,
        "environment": measuring.environment(device),
        "curves": solvers_curves.measure(settings["ReLU"], spectra, quick=quick, device=device),
        "systems": solvers_systems.measure(quick=quick),
        "network": {
            "system": solvers_network.measure_solvers(settings["ReLU"], spectra, weights),
            "providers": solvers_network.measure_providers(settings, repeats=3 if quick else 31),
        },
        "trajectory": solvers_trajectory.measure(quick=quick),
    }


def show(figures: dict[str, Any]) -> None:
    """The main results, as tables on the terminal."""
    rows, columns = figures["curves"]["curves"], solvers_curves.COLUMNS
    for system in names(rows, "system"):
        measuring.show(system, curves_header(columns), curves(rows, system, columns))
    title = f"{len(figures['curves']['successive'][0]['products'])} right-hand sides one after the other"
    measuring.show(title, SUCCESSIVE_HEADER, successive(figures["curves"]["successive"]))


def draw(figures: dict[str, Any], path: Path) -> None:
    """Write the picture of the curves."""
    rows = figures["curves"]
    later = [name for name in names(rows, "system") if name.startswith(solvers_curves.LATER)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(picture(rows, noise={solvers_curves.BISSL: figures["noise"]}, later=later), encoding="utf-8")


def update(pages: list[Path], figures: dict[str, Any], *, check: bool) -> bool:
    """Write every table into its page, or with `check` only compare; whether the pages are as they should be."""
    tables, right = solvers_tables.tables(figures), True
    for page in pages:
        old = page.read_text(encoding="utf-8")
        new = solvers_tables.insert(old, tables)
        if check and new != old:
            print(f"{page} does not agree with the figures; run this again without --check", file=sys.stderr)
            right = False
        elif not check:
            page.write_text(new, encoding="utf-8")
    return right


def parser() -> argparse.ArgumentParser:
    options = measuring.parser(__doc__)
    options.add_argument("--from", type=Path, dest="source", help="take figures from this file instead of measuring")
    options.add_argument("--docs", type=Path, nargs="+", default=[], help="put tables between these pages' markers")
    options.add_argument("--figure", type=Path, help="draw the curves into this SVG file")
    options.add_argument("--check", action="store_true", help="change no page; exit code 1 if one differs")
    return options


def main(arguments: list[str] | None = None) -> int:
    command_line = parser()
    options = command_line.parse_args(arguments)
    if options.check and not options.docs:
        command_line.error("--check needs --docs")
    measuring.use_threads(options.threads)
    if options.source:
        figures = json.loads(options.source.read_text(encoding="utf-8"))
    else:
        figures = measure(quick=options.quick, device=options.device)
    measuring.write_json(options.json, figures)
    if options.figure:
        draw(figures["curves"], options.figure)
    if options.docs:
        return 0 if update(options.docs, figures, check=options.check) else 1
    show(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
