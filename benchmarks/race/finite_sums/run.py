"""Time, oracle calls and iterations of stochastic methods on benchmark_bilevel's problems, here and in JAX.

    pip install -e ".[bench,race]"
    git clone https://github.com/benchopt/benchmark_bilevel ../benchmark_bilevel
    python benchmarks/race/finite_sums/run.py --benchmark-bilevel ../benchmark_bilevel \
        --json benchmarks/results/finite_sums.json --docs docs/peers.md --figure docs/_static/finite_sums.svg
    python benchmarks/race/finite_sums/run.py --from benchmarks/results/finite_sums.json --docs docs/peers.md --check

Every method has the same problems, starts, batches of 64, grid of steps and budget of oracle calls. The clock is
processor time on one thread, without compilation; F(x, y*(x)) is found while it stands. Without JAX or without a
checkout this package's methods run alone.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from benchmarks import measuring, pages
from benchmarks.peers.adapters import installed
from benchmarks.race.finite_sums import tables
from benchmarks.race.finite_sums.contestants import METHODS, Entry, own
from benchmarks.race.finite_sums.jax_contestants import SOLVERS, one_thread, peers
from benchmarks.race.finite_sums.measure import Figures, measure_problem
from benchmarks.race.finite_sums.problems import FiniteSum, data_cleaning, hyperparameter_selection, quadratics


def problems(*, quick: bool) -> tuple[FiniteSum, ...]:
    if quick:
        return (
            quadratics(samples=128, size=10, budget=20_000),
            data_cleaning(samples=128, clean=64, budget=20_000),
            hyperparameter_selection(samples=128, above=128, budget=20_000),
        )
    return quadratics(), data_cleaning(), hyperparameter_selection()


def commit(checkout: Path | None) -> str | None:
    """The first letters of a checkout's commit; None where git does not tell."""
    if checkout is None:
        return None
    told = subprocess.run(["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return told.stdout.strip() or None


def measure(entries: Sequence[Entry], checkout: Path | None, *, quick: bool) -> Figures:
    measured = [measure_problem(problem, entries, quick=quick) for problem in problems(quick=quick)]
    versions = {name: installed(name) for name in ("jax", "jaxopt")}
    return {
        "quick": quick,
        "environment": measuring.environment(),
        "versions": {**versions, "benchmark_bilevel": commit(checkout)},
        "problems": measured,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = measuring.parser(__doc__)
    parser.add_argument("--benchmark-bilevel", type=Path, metavar="PATH", help="folder of a checkout, for its solvers")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these, of either side")
    parser.add_argument("--from", type=Path, dest="source", help="take figures from this file instead of measuring")
    parser.add_argument("--docs", type=Path, help="put the tables between the markers of this page")
    parser.add_argument("--figure", type=Path, help="draw the curves here (SVG)")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the page differs")
    options = parser.parse_args(arguments)
    checkout: Path | None = options.benchmark_bilevel
    if options.check and not options.docs:
        parser.error("--check needs --docs")
    if options.device.type != "cpu":
        parser.error("the race is run on the CPU: its problems are too small for an accelerator")
    if checkout is not None and not (checkout / "solvers" / f"{SOLVERS['SABA']}.py").is_file():
        parser.error(f"--benchmark-bilevel {checkout}: there is no solvers/{SOLVERS['SABA']}.py; name a checkout of it")
    one_thread()
    measuring.use_threads(1 if options.threads is None else options.threads)
    entries = [*map(own, METHODS), *peers(checkout)]
    known = {entry.name for entry in entries}
    if options.methods and not known.issuperset(options.methods):
        parser.error(
            f"--methods: no {', '.join(set(options.methods) - known)} here; there are {', '.join(sorted(known))}"
        )
    entries = [entry for entry in entries if not options.methods or entry.name in options.methods]
    kept: Path | None = options.source
    figures = json.loads(kept.read_text(encoding="utf-8")) if kept else measure(entries, checkout, quick=options.quick)
    measuring.write_json(options.json, figures)
    if options.figure and not options.check:
        tables.draw(figures, options.figure)
    if options.docs:
        return pages.update(options.docs, tables.tables(figures), check=options.check)
    for problem in figures["problems"]:
        measuring.show(problem["problem"], *tables.problem_table(problem))
    return 0


if __name__ == "__main__":
    sys.exit(main())
