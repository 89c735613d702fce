"""The tables of docs/cost.md from the kept figures of alternation.py, hvp.py and pretext.py.

python benchmarks/cost_page.py [--check]
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.pages import conditions, number, table, update

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "cost.md"

Figures = Mapping[str, Any]


def shown(name: str, write: Callable[[Figures], str]) -> str:
    """What `write` makes of kept figures, or that there are none."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return "Not measured yet: run the command above."
    return write(json.loads(path.read_text(encoding="utf-8")))


def spread(row: Mapping[str, float]) -> str:
    """Median and quartiles."""
    return f"{row['median']:.2f} ({row['q1']:.2f} to {row['q3']:.2f})"


def several(values: Iterable[float]) -> str:
    """One figure an alternation."""
    return ", ".join(number(value) for value in values)


def alternation(figures: Figures) -> str:
    """One row a setting; what the solves take is the ratio above that of the setting without any."""
    without = figures["overhead"]["identity"]["ratio"]
    rows = [
        [
            f"`{name}`",
            f"{row['ratio']:.2f} ({row['quartiles'][0]:.2f} to {row['quartiles'][1]:.2f}, n = {row['repeats']})",
            f"{row['ratio'] - without:.2f}",
            several(row["error"]),
            "" if row["solve_error"] is None else number(row["solve_error"]),
            ", ".join(str(count) for count in row["hvps"]),
            f"{row['peak_memory_mib']:.0f}",
        ]
        for name, row in figures["overhead"].items()
    ]
    header = [
        "setting",
        "times plain training",
        "solves alone",
        "error of the summed update",
        "median solve",
        "HVPs",
        "peak MiB",
    ]
    plain = f"Plain training peaks at {figures['plain']['peak_memory_mib']:.0f} MiB."
    floor = f"Noise floors: {several(figures['noise_floor'])}. {plain} {conditions(figures)}"
    return f"{table(header, rows)}\n\n{floor}"


def aggregation(figures: Figures) -> str:
    """One row a choice of gamma, momentum and norm limit."""
    rows = [
        [
            f"{row['gamma']:g}",
            f"{row['momentum']:g}",
            "none" if row["max_grad_norm"] is None else f"{row['max_grad_norm']:g}",
            number(row["bias"]),
            f"{row['length_ratio']:.2f}",
        ]
        for row in figures["aggregation"]
    ]
    return table(["gamma", "momentum", "norm limit", "distance", "length ratio"], rows)


def products(figures: Figures) -> str:
    """One row a network and provider."""
    rows = [
        [
            case["case"] if index == 0 else "",
            name,
            spread(row["gradients"]),
            f"{row['bytes_above_gradient'] / 2**20:.0f}",
            number(row["error"]),
        ]
        for case in figures["cases"]
        for index, (name, row) in enumerate(case["providers"].items())
    ]
    return table(["network", "provider", "gradients", "MiB above", "error"], rows) + f"\n\n{conditions(figures)}"


def kept(figures: Figures) -> str:
    """Kept over recomputed graphs."""
    rows = [
        [case["case"], spread(ratios["later"]), spread(ratios["five"]), f"{case['graph_bytes'] / 2**20:.0f}"]
        for case, ratios in zip(figures["cases"], figures["kept_over_recomputed"].values(), strict=True)
    ]
    return table(["network", "a later product", "five products, the first included", "MiB a graph"], rows)


def pretext(figures: Figures) -> str:
    """One row a part and side."""
    rows = [
        [
            f"{part}: {name}",
            f"{row['images_per_second']['median']:.0f}",
            f"{row['images_per_second']['q1']:.0f} to {row['images_per_second']['q3']:.0f}",
            spread(row["ratio"]),
        ]
        for part in ("pipeline", "step", "whole")
        for name, row in figures[part].items()
    ]
    setting = figures["setting"]
    what = f"{setting['backbone']}, {setting['size']} px, batch {setting['batch']}, {setting['pipeline_batch']} a draw"
    return f"{table(['part', 'images/s', 'quartiles', 'speed ratio'], rows)}\n\n{what}. {conditions(figures)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where the page disagrees")
    options = parser.parse_args()
    return update(PAGE, tables(), check=options.check)


def tables() -> dict[str, str]:
    """Every table of the page."""
    return {
        "alternation": shown("alternation", alternation),
        "aggregation": shown("alternation", aggregation),
        "products": shown("hvp", products),
        "kept": shown("hvp", kept),
        "pretext": shown("pretext", pretext),
    }


if __name__ == "__main__":
    sys.exit(main())
