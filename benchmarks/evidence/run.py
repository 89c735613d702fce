"""What the implicit term brings on photographs: BiSSL beside its controls, the whole pipeline repeated.

    python benchmarks/evidence/run.py second --design
    python benchmarks/evidence/run.py second --images folder:PATH --output-dir runs/evidence-second --jobs 2 \\
        --json benchmarks/results/evidence_second.json --docs docs/results.md

A round is its configuration beside this file (`first.toml`, `second.toml`) and what `rounds.py` says of it: the family
of comparisons, with Holm's correction over all of it, and the search of the upper level's learning rates, which comes
first. Every arm makes the same number of pretext steps, the warm-up is shared by the arms of a seed. `--design` prints
what the design can detect, before anything is run:

    smallest effect = (t_{1 - level/2, n-1} + t_{0.8, n-1}) s / sqrt(n)

the difference of two arms that a paired t test over n seeds finds with a probability of 0.8, for a standard deviation s
of the paired differences. Before the run s is what earlier runs found, after it the one of this. An interrupted command
goes on where it was when it is given again; arms and seeds are made side by side by `--jobs` processes, which changes
no bit of the result.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.evidence.analysis import analyse, design_table, tables
from benchmarks.evidence.rates import choose, chosen_options, search_options
from benchmarks.evidence.rounds import ROOT, ROUNDS, Round
from benchmarks.measuring import environment, show, write_json
from benchmarks.pages import update
from recipes.experiment.folder.run_folder import RESULTS
from recipes.experiment.records import read_run

RUN = ROOT / "recipes" / "bissl" / "run.py"


class RunFailed(Exception):
    """A run of BiSSL ended early, with this exit code; it has said why itself, unless a signal ended it."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def run_all(made: Round, images: str, folder: Path, jobs: int) -> None:
    """The search, where the round has one, then all seeds of all arms; what is finished already is not made again.

    Raises:
        RunFailed: with the exit code of the run.
    """
    common = [sys.executable, str(RUN), "--config", str(made.config), "--data.pretext", images]
    common += ["--data.downstream", images, "--artifacts", str(folder / "artifacts"), "--jobs", str(jobs), "--resume"]

    def bissl(output: Path, options: Sequence[str]) -> None:
        process = subprocess.Popen([*common, "--output-dir", str(output), *options])
        code = None
        while code is None:
            # Ctrl-C reaches the run as well, which saves and ends by itself.
            with suppress(KeyboardInterrupt):
                code = process.wait()
        if code < 0:
            print(f"the run was ended by signal {-code}; the same command goes on", file=sys.stderr)
        if code:
            raise RunFailed(code if code > 0 else 128 - code)

    rates: list[str] = []
    if made.search is not None:
        bissl(folder / "search", search_options(made))
        rates = chosen_options(made, {arm: each["chosen"] for arm, each in searched(made, folder)["arms"].items()})
    bissl(folder / "result", rates)


def searched(made: Round, folder: Path) -> dict[str, Any]:
    """What the finished search found."""
    return choose(made, read_run(folder / "search").events)


def figures_of(made: Round, folder: Path) -> dict[str, Any]:
    """Figures of a finished round."""
    results = json.loads((folder / "result" / RESULTS).read_text(encoding="utf-8"))
    found = analyse(made, results, read_run(folder / "result").events)
    search = {} if made.search is None else {"search": searched(made, folder)}
    return {"quick": False, "environment": environment("cpu"), **found, **search}


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("round", choices=ROUNDS, help="which one")
    options.add_argument("--images", help='"folder:PATH" of class folders')
    options.add_argument("--output-dir", type=Path, help="folder of the runs (default: runs/evidence-ROUND)")
    options.add_argument("--jobs", type=int, default=1, help="processes that make arms and seeds side by side")
    options.add_argument("--design", action="store_true", help="print what the design can detect, and run nothing")
    options.add_argument("--json", type=Path, help="keep the figures there")
    options.add_argument("--docs", type=Path, help="write the tables into this page")
    given = options.parse_args(arguments)
    made = ROUNDS[given.round]
    if given.design:
        print(f"{made.seeds} seeds; differences in points of top-1, found with a probability of 0.8\n")
        print(design_table(made))
        return 0
    if not given.images or given.jobs < 1:
        options.error("--images folder:PATH is needed, and --jobs at least 1")
    folder = given.output_dir or Path("runs") / f"evidence-{made.name}"
    try:
        run_all(made, given.images, folder, given.jobs)
    except RunFailed as failed:
        return failed.code
    return report(made, figures_of(made, folder), given.json, given.docs)


def report(made: Round, figures: dict[str, Any], json_path: Path | None, page: Path | None) -> int:
    """Print the figures and keep them."""
    rows = [
        [c["a"], c["b"], f"{c['difference']:+.2f}", "{:+.2f} to {:+.2f}".format(*c["ci95"]), f"{c['p_holm']:.3f}"]
        for c in figures["comparisons"]
    ]
    show("Paired differences of top-1", ["a", "b", "points", "95% interval", "p after Holm"], rows)
    if json_path is not None:
        write_json(json_path, figures)
    return 0 if page is None else update(page, tables(made, figures), check=False)


if __name__ == "__main__":
    sys.exit(main())
