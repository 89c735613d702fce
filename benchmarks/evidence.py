"""What the implicit term brings on photographs: BiSSL beside its controls, the whole pipeline repeated.

    python benchmarks/evidence.py --images folder:PATH --output-dir runs/evidence --processes 2 \\
        --json benchmarks/results/evidence.json --docs docs/results.md

The runs are those of ``benchmarks/evidence.toml``: every arm at the same number of pretext steps, the warm-up shared by
the arms of a seed. `--design` prints what the design can detect, before anything is run:

    smallest effect = (t_{0.975, n-1} + t_{0.8, n-1}) s / sqrt(n)

the difference of two arms that a paired t test over n seeds finds with a probability of 0.8, for a standard deviation s
of the paired differences. Before the run s is a guess from earlier fine-tunings, after it the one that was found.
Comparisons are the family below, with Holm's correction over all of it. An interrupted command goes on where it was.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scipy import stats

from benchmarks.measuring import environment, show, write_json
from benchmarks.pages import conditions, table, update
from recipes.experiment.configuration import read_config_file
from recipes.experiment.folder.run_folder import RESULTS
from recipes.experiment.records import Event, read_run, select
from recipes.experiment.statistics import holm, mean_std, paired

ROOT = Path(__file__).resolve().parents[1]
CONFIG, RUN = ROOT / "benchmarks" / "evidence.toml", ROOT / "recipes" / "bissl" / "run.py"

FAMILY = (
    ("bissl", "identity"),
    ("bissl-low-damping", "identity"),
    ("identity", "restart"),
    ("restart", "baseline"),
    ("bissl", "baseline"),
    ("bissl", "restart"),
    ("baseline", "scratch"),
)
"""What is compared: the solve, the upper level without it, the restart, the method, and pre-training itself."""

GUESSED_SPREAD = math.sqrt(2.0) * 1.6
"""Standard deviation of a paired difference (points of top-1): arms of independent noise, each with the deviation of
about 1.6 that three fine-tunings of the photographs preset had (docs/results.md)."""

Figures = dict[str, Any]


def smallest_effect(pairs: int, spread: float, *, power: float = 0.8, level: float = 0.05) -> float:
    """(t_{1 - level/2} + t_{power}) spread / sqrt(pairs), with pairs - 1 degrees of freedom."""
    quantiles = stats.t.ppf(1.0 - level / 2.0, pairs - 1) + stats.t.ppf(power, pairs - 1)
    return float(quantiles * spread / math.sqrt(pairs))


def run_all(images: str, folder: Path, seeds: Sequence[int], processes: int) -> None:
    """Every seed's pipelines, `processes` at a time, with one store of artifacts; then the table of all.

    Raises:
        subprocess.CalledProcessError: a run failed; what it printed says why.
    """
    common = [sys.executable, str(RUN), "--config", str(CONFIG), "--data.pretext", images, "--data.downstream", images]
    common += ["--artifacts", str(folder / "artifacts"), "--resume"]
    share = math.ceil(len(seeds) / processes)
    started = []
    for first in seeds[::share]:
        count = min(share, seeds[-1] + 1 - first)
        part = ["--seed", str(first), "--pipeline-seeds", str(count), "--output-dir", str(part_of(folder, first))]
        started.append((common + part, subprocess.Popen(common + part)))
    for command, process in started:
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, command)
    subprocess.run([*common, "--output-dir", str(folder / "all")], check=True)


def part_of(folder: Path, first: int) -> Path:
    return folder / f"from-seed-{first}"


def analyse(results: Mapping[str, Any], events: Sequence[Event]) -> Figures:
    """Arms, comparisons and what the solves were like."""
    metric = results["primary_metric"]
    scores = {arm: row[metric]["per_seed"] for arm, row in results["variants"].items()}
    found = [paired(scores[a], scores[b]) for a, b in FAMILY]
    corrected = holm([each.p_value for each in found])
    comparisons = []
    for (a, b), each, p_holm in zip(FAMILY, found, corrected, strict=True):
        _, spread = mean_std([x - y for x, y in zip(scores[a], scores[b], strict=True)])
        detectable = None if spread is None else smallest_effect(len(scores[a]), spread)
        comparisons.append(
            {
                **{"a": a, "b": b, "difference": each.difference, "ci95": each.ci95},
                **{"p_value": each.p_value, "p_holm": p_holm, "spread": spread, "detectable": detectable},
            }
        )
    return {
        "seeds": results["seeds"],
        "metric": metric,
        "arms": {arm: _arm(row, metric) for arm, row in results["variants"].items()},
        "comparisons": comparisons,
        "solves": solves(events),
        "guessed_spread": GUESSED_SPREAD,
        "guessed_detectable": smallest_effect(len(results["seeds"]), GUESSED_SPREAD),
    }


def solves(events: Sequence[Event]) -> dict[str, Figures]:
    """cos(x, v) and ||x - v|| / ||v|| of every alternation's solve: range and median, by arm; iterations, statuses."""
    kinds: dict[str, list[Event]] = {}
    for event in select(events, "bissl", "upper"):
        if event.get("status") is not None:
            kinds.setdefault(event["variant"], []).append(event)
    rows = {}
    for arm, solved in kinds.items():
        cosines, changes = ([float(e[field]) for e in solved] for field in ("cosine", "relative_change"))
        by_alternation: dict[int, list[float]] = {}
        for event in solved:
            by_alternation.setdefault(int(event["alternation"]), []).append(float(event["cosine"]))
        rows[arm] = {
            "solves": len(solved),
            "cosine": {"min": min(cosines), "median": statistics.median(cosines), "max": max(cosines)},
            "relative_change": {
                "min": min(changes),
                "median": statistics.median(changes),
                "max": max(changes),
            },
            "cosine_by_alternation": [statistics.median(by_alternation[i]) for i in sorted(by_alternation)],
            "products": statistics.mean(float(e["num_hvps"]) for e in solved),
            "statuses": {s: sum(e["status"] == s for e in solved) for s in sorted({e["status"] for e in solved})},
        }
    return rows


def _arm(row: Mapping[str, Any], metric: str) -> Figures:
    kept = {name: row[name] for name in ("pretext_steps", "label_steps", "seconds")}
    return {**row[metric], **kept}


def tables(figures: Figures) -> dict[str, str]:
    """The tables of the page."""
    arms = [
        [
            *(f"`{arm}`", f"{r['mean']:.2f} ± {r['std']:.2f}"),
            *(str(r["pretext_steps"]), str(r["label_steps"]), f"{r['seconds']:.0f}"),
        ]
        for arm, r in figures["arms"].items()
    ]
    comparisons = [
        [
            f"`{c['a']}` − `{c['b']}`",
            f"{c['difference']:+.2f} [{c['ci95'][0]:+.2f}, {c['ci95'][1]:+.2f}]",
            f"{c['p_value']:.3f}",
            f"{c['p_holm']:.3f}",
            f"{c['detectable']:.2f}",
        ]
        for c in figures["comparisons"]
    ]
    solved = [
        [
            *(f"`{arm}`", str(r["solves"])),
            *(f"{r['cosine'][key]:.3f}" for key in ("min", "median", "max")),
            *(f"{r['relative_change']['median']:.3f}", f"{r['products']:.1f}"),
            ", ".join(f"{count} {status}" for status, count in r["statuses"].items()),
        ]
        for arm, r in figures["solves"].items()
    ]
    header = ["arm", "top-1 (%)", "pretext steps", "label steps", "seconds"]
    return {
        "evidence-arms": f"{table(header, arms)}\n\n{conditions(figures)}",
        "evidence-comparisons": table(
            ["arms", "difference [95% interval]", "p", "p after Holm", "detectable"], comparisons
        ),
        "evidence-solves": table(
            ["arm", "solves", "cos least", "median", "most", "‖x−v‖/‖v‖", "products", "statuses"], solved
        ),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--images", help='"folder:PATH" of class folders')
    options.add_argument("--output-dir", type=Path, default=Path("runs/evidence"), help="folder of the runs")
    options.add_argument("--processes", type=int, default=1, help="seeds at a time")
    options.add_argument("--design", action="store_true", help="print what the design can detect, and run nothing")
    options.add_argument("--json", type=Path, help="keep the figures there")
    options.add_argument("--docs", type=Path, help="write the tables into this page")
    given = options.parse_args(arguments)
    count = read_config_file(CONFIG)["pipeline_seeds"]
    if given.design:
        effect = smallest_effect(count, GUESSED_SPREAD)
        print(f"{count} seeds, differences spread by {GUESSED_SPREAD:.2f} points: smallest effect {effect:.2f} points")
        return 0
    if not given.images or given.processes < 1:
        options.error("--images folder:PATH is needed, and --processes at least 1")
    run_all(given.images, given.output_dir, range(count), given.processes)
    return report(given.output_dir, given.json, given.docs)


def report(folder: Path, json_path: Path | None, page: Path | None) -> int:
    """Figures of finished runs, printed and kept."""
    results = json.loads((folder / "all" / RESULTS).read_text(encoding="utf-8"))
    events = [event for part in sorted(folder.glob("from-seed-*")) for event in read_run(part).events]
    figures = {"quick": False, "environment": environment("cpu"), **analyse(results, events)}
    rows = [
        [c["a"], c["b"], f"{c['difference']:+.2f}", "{:+.2f} to {:+.2f}".format(*c["ci95"]), f"{c['p_holm']:.3f}"]
        for c in figures["comparisons"]
    ]
    show("Paired differences of top-1", ["a", "b", "points", "95% interval", "p after Holm"], rows)
    if json_path is not None:
        write_json(json_path, figures)
    return 0 if page is None else update(page, tables(figures), check=False)


if __name__ == "__main__":
    sys.exit(main())
