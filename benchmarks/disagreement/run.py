"""Where the truth is known: when does solving the linear system beat taking its right-hand side?

    python benchmarks/disagreement/run.py --threads 1 --json benchmarks/results/disagreement.json \\
        --docs docs/worth.md --figure docs/_static/disagreement.svg

Linear models, drawn (`model.py`), whose pretext and downstream tasks disagree by a dial: the risk on new data is a
closed form. Sweeps move one dial at a time around one setting. Rules made of what can be known beforehand are fitted on
random settings and tried on as many others.
"""

import sys
from pathlib import Path
from typing import Any

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.disagreement.figure import draw_figure
from benchmarks.disagreement.study import measure
from benchmarks.disagreement.tables import tables
from benchmarks.measuring import environment, parser, show, use_threads, write_json
from benchmarks.pages import update


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--docs", type=Path, help="write the tables into this page")
    options.add_argument("--figure", type=Path, help="draw the picture there (SVG)")
    given = options.parse_args(arguments)
    use_threads(given.threads)
    figures: dict[str, Any] = {"quick": given.quick, "environment": environment(), **measure(quick=given.quick)}
    write_json(given.json, figures)
    rows = [[each["rule"], f"{each['hits']['mean']:.2f}", f"{each['loss']['mean']:.3f}"] for each in figures["rules"]]
    show("Advice on settings that the rule has not seen", ["rule", "right", "mean ln risk lost"], rows)
    if given.figure is not None:
        draw_figure(figures["curves"], given.figure)
    return 0 if given.docs is None else update(given.docs, tables(figures), check=False)


if __name__ == "__main__":
    sys.exit(main())
