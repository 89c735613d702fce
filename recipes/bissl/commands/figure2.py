"""``bissl figure2``: the paper's Figure 2, test scores of both arms over the length of pre-training."""

import json
from pathlib import Path
from typing import Any

from bilevel.checkpoint import write_atomic

from ...experiment.artifacts import ArtifactStore
from ...experiment.command.parsing import Parser
from ...experiment.configuration import read_config_file
from ...experiment.errors import ConfigError
from ...experiment.folder.folder_lease import leased
from ...experiment.folder.paths import user_path
from ...experiment.folder.run_folder import CONFIG, RESULTS
from ...experiment.tracking import check_installed
from ..outcome import estimate
from ..outcome.checks import check_data, check_places, dry_data
from ..outcome.console_table import comparison_lines
from ..outcome.open_run import check_images, make_pipeline
from ..outcome.pretext_length.curve import length_curve_png
from ..outcome.pretext_length.runs import Point, config_at, csv_text, is_finished, summary, warmup_cut
from ..outcome.side_by_side.all_stages import run_whole
from ..outcome.wording import shown_name
from ..settings.run_directory import run_directory
from ..training.costs import artifact_store
from ..training.datasets import Datasets
from .parsing import Request, parse

FIGURE, SUMMARY, TABLE = "figure2.png", "figure2.json", "figure2.csv"
ARTIFACTS = "artifacts"

_DESCRIPTION = f"""\
The whole pipeline at several lengths of pre-training, and its test scores over them: the paper's Figure 2. A length is
that of the baseline; BiSSL's warm-up is shorter by what its bilevel stage counts for: pretext.baseline_epochs -
pretext.epochs where the preset sets both (the paper's: 100), else the epochs' worth of lower steps. All options of the
pipeline (--preset, --seeds, --pretext.batch-size, ...) are taken as well: --help without `figure2` lists them.

Written to the output folder: a run in each epochs-E, their stages in {ARTIFACTS}, {FIGURE}, {SUMMARY}, {TABLE}.
"""


def main(arguments: list[str]) -> int:
    """Make the runs that are not there yet, then the figure.

    Raises:
        ConfigError, DataError, ArtifactError, PluginError: bad input, or runs of another configuration in the folder.
        NonFiniteError: a run went wrong.
    """
    given, others = _parser().parse_known_args(arguments)
    folder = user_path(given.output_dir)
    request = parse([*others, f"--output-dir={folder}"])
    _check(request, folder)
    data = dry_data(request.config) if request.dry_run else Datasets(request.config)
    cut = warmup_cut(request.config, lambda: len(data.pretext))
    # All of them are made before anything is run: a length that is too short is no surprise after days.
    points = [
        Point(epochs, config_at(request.config, epochs, cut), run_directory(folder / f"epochs-{epochs}"))
        for epochs in _lengths(given.epochs)
    ]
    store = request.artifacts or folder / ARTIFACTS
    check_places(request.config.data, {"output-dir": folder, "--artifacts": store})
    check_installed(request.config.tracking)
    if request.dry_run:
        for point in points:
            pipeline = make_pipeline(point.config, point.directory.path, artifact_store(store), data)
            checked = check_data(pipeline.config, data, pipeline.computing, published=True)
            described = estimate.describe(pipeline.config, checked, data)
            print(f"{point.directory.path}: {point.epochs} pretext epochs\n{described}")
        return 0
    with leased(folder, "output-dir"):
        results = _run(points, request, folder, artifact_store(store), data)
        content = summary([(point, results[point.epochs]) for point in points], cut)
        write_figure(folder, content)
    print(f"{folder / FIGURE}, {folder / SUMMARY}, {folder / TABLE}")
    return 0


def write_figure(folder: Path, content: dict[str, Any]) -> None:
    """Write figure, summary and table.

    Raises:
        ConfigError: the folder cannot be written to, or matplotlib is not installed.
    """
    lines = {
        arm: [(p["epochs"], p["arms"][arm]["mean"], p["arms"][arm]["std"] or 0.0) for p in content["points"]]
        for arm in content["points"][0]["arms"]
    }
    metric, seeds = content["metric"], len(content["seeds"])
    percent = " (%)" if metric.startswith(("top", "map")) else ""
    repeated = "fine-tunings of one backbone" if content["repeats"] == "finetune" else "whole pipelines"
    bars = f"Bars: standard deviation over {seeds} {repeated}. " if seeds > 1 else "One seed. "
    note = f"{bars}BiSSL's warm-up is shorter; difference in epochs: {content['warmup_shorter_by']}."
    try:
        picture = length_curve_png(
            lines, title=shown_name(content["dataset"]), metric=f"test {metric}{percent}", note=note
        )
        write_atomic(folder / TABLE, csv_text(content).encode())
        write_atomic(folder / SUMMARY, json.dumps(content, indent=1, allow_nan=False).encode())
        write_atomic(folder / FIGURE, picture)
    except OSError as error:
        raise ConfigError(f"output-dir: {folder} cannot be written to ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{FIGURE} was not written: {error}") from error


def _run(
    points: list[Point], request: Request, folder: Path, store: ArtifactStore, data: Datasets
) -> dict[int, dict[str, Any]]:
    """The content of each point's results.json, by epochs."""
    finished = {point.epochs for point in points if is_finished(point)}
    if finished and not request.resume:
        raise ConfigError(f"output-dir: {folder} holds finished runs already; go on with --resume, or name another one")
    if len(finished) < len(points):
        # Before anything is written; lengths share data and batch sizes.
        first = make_pipeline(points[0].config, points[0].directory.path, store, data)
        check_data(first.config, data, first.computing)
        for point in points:
            if point.epochs not in finished:
                check_images(data, point.directory, first.workspace.console)
    for point in points:
        point.directory.open(point.config, resume=request.resume, overwrite=False)
    results = {}
    for point in points:
        if point.epochs in finished:
            results[point.epochs] = read_config_file(point.directory.path / RESULTS)
            print(f"{point.epochs} pretext epochs: found in {point.directory.path}")
            continue
        with point.directory.leased(point.config, resume=True, overwrite=False):
            pipeline = make_pipeline(point.config, point.directory.path, store, data)
            results[point.epochs] = run_whole(pipeline, point.directory)
        print(f"{point.epochs} pretext epochs: {comparison_lines(results[point.epochs])[0]}")
    return results


def _check(request: Request, folder: Path) -> None:
    """Refuse what does not go together."""
    if request.command != "all":
        raise ConfigError(f"figure2: runs whole pipelines, not the stage {request.command!r}; leave it out")
    if request.overwrite:
        raise ConfigError("--overwrite: figure2 replaces no runs; name another --output-dir, or delete the folder")
    if request.list_presets:
        raise ConfigError("--list-presets: leave out figure2 to see them")
    if (folder / CONFIG).exists():
        raise ConfigError(f"output-dir: {folder} is the folder of a single run; name another one")


def _lengths(text: str) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--epochs: must be whole numbers separated by commas, got {text!r}") from error
    if min(lengths) < 1 or len(set(lengths)) < len(lengths):
        raise ConfigError(f"--epochs: must be above 0, each given once, got {text!r}")
    return sorted(lengths)


def _parser() -> Parser:
    parser = Parser(_DESCRIPTION, command="figure2")
    parser.add_argument(
        "--epochs",
        required=True,
        metavar="E,E,...",
        help="lengths of pre-training in pretext epochs, the bilevel stage counted (the paper does not list its own)",
    )
    parser.add_argument("--output-dir", default="figure2", metavar="DIR", help="folder of the runs (default: figure2)")
    return parser
