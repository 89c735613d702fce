"""``bissl table``: Table 1 from finished runs, beside the paper's figures."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from bilevel.checkpoint import write_atomic

from ...experiment.command.parsing import Parser
from ...experiment.errors import ConfigError
from ...experiment.folder.paths import user_path
from ...experiment.html import Bullets, Section, render_page
from ...experiment.tables import latex, markdown
from ...experiment.terminal import command_name
from ..outcome.paper_table.columns import arms_table, csv_text, main_table
from ..outcome.paper_table.rows import FinishedRun, arm_rows, labelled_notes, main_rows, on_gpu, read_finished
from ..outcome.wording import FINETUNE_NOISE, PIPELINE_NOISE
from ..settings.paper import PaperVersion

FILES = ("table.md", "table.csv", "arms.csv", "table.tex", "table.html")

_DESCRIPTION = """\
The paper's Table 1 from finished runs: BiSSL and the baseline of each, their difference, and the paper's figures; then
every arm with its cost. Written as markdown, CSV (all digits), LaTeX and HTML; the markdown is printed.
"""


def main(arguments: list[str]) -> int:
    """Make the tables that `arguments` ask for.

    Raises:
        ConfigError: a run is missing, unfinished or damaged, or the files are there already.
    """
    given = _parser().parse_args(arguments)
    runs = _read([user_path(run) for run in given.runs], skip=given.skip_unfinished)
    folder = user_path(given.to)
    there = [name for name in FILES if (folder / name).exists()]
    if there and not given.overwrite:
        raise ConfigError(f"--to: {folder} holds {', '.join(there)} already; replace them with --overwrite")
    written = table_files(runs, given.paper_version or _version(runs))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in written.items():
            write_atomic(folder / name, text.encode())
    except OSError as error:
        raise ConfigError(f"--to: {folder} cannot be written to ({error.strerror})") from error
    print(written["table.md"])
    print(f"{', '.join(FILES)} in {folder}")
    return 0


def table_files(runs: Sequence[FinishedRun], version: PaperVersion) -> dict[str, str]:
    """The content of each of `FILES`."""
    rows, arms = main_rows(runs, version), arm_rows(runs, version)
    hours = "GPU hours" if on_gpu(runs) else "hours"
    tables, notes = [main_table(rows), arms_table(arms, hours)], _notes(runs, version)
    sections = [
        *(Section(table.title, [replace(table, title="")]) for table in tables),
        Section("Notes", [Bullets(notes)]),
    ]
    page = render_page("BiSSL: results", [], sections)
    texts = (markdown(tables, notes), csv_text(rows), csv_text(arms), latex(tables, notes), page)
    return dict(zip(FILES, texts, strict=True))


def _parser() -> Parser:
    parser = Parser(_DESCRIPTION, command="table")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="output folder of a run")
    parser.add_argument("--to", default="table", metavar="DIR", help="folder for the tables (default: table)")
    parser.add_argument(
        "--paper-version",
        choices=get_args(PaperVersion),
        help="whose figures stand beside the results (default: that of the runs)",
    )
    parser.add_argument("--skip-unfinished", action="store_true", help="leave out unfinished and damaged runs")
    parser.add_argument("--overwrite", action="store_true", help="replace tables that are there already")
    return parser


def _read(folders: Sequence[Path], *, skip: bool) -> list[FinishedRun]:
    runs, problems = [], []
    for folder in {folder.resolve(): folder for folder in folders}.values():
        try:
            runs.append(read_finished(folder))
        except ConfigError as error:
            problems.append(str(error))
    if problems and not skip:
        raise ConfigError("\n".join([*problems, "or leave such runs out by --skip-unfinished"]))
    for problem in problems:
        print(f"{command_name()} table: left out: {problem}", file=sys.stderr)
    if not runs:
        raise ConfigError("none of the runs is finished, so that there is nothing to make a table of")
    return runs


def _version(runs: Sequence[FinishedRun]) -> PaperVersion:
    version = runs[0].paper_version
    if any(run.paper_version != version for run in runs):
        raise ConfigError("--paper-version: the runs were made with values of both versions; say whose figures to show")
    return version


def _notes(runs: Sequence[FinishedRun], version: PaperVersion) -> list[str]:
    kinds = {run.results.repeats for run in runs}
    meanings = {"finetune": f"Welch's test: {FINETUNE_NOISE}", "pipeline": f"Paired test: {PIPELINE_NOISE}"}
    return [
        "Mean ± standard deviation over seeds; accuracies are in percent. Differences are BiSSL minus the other arm.",
        "p (Holm) is corrected over all rows of its table.",
        *(meaning for kind, meaning in meanings.items() if kind in kinds),
        "Steps and hours (wall-clock, on one device) are those of one repeat of an arm, all its stages together.",
        f"Paper: Table 1 of version {version.removeprefix('v')}.",
        *(f"{label}: {note}" for label, notes in labelled_notes(runs) for note in notes),
    ]
